"""The README's pictures: the leaderboard in a terminal as SVG, the page at desktop width as PNG.

    python tools/screenshots.py FOLDER [--out .github/images] [--quality SET]

FOLDER: a working folder with runs/results.jsonl, and the sets that were evaluated where they were then.
Needs selenium and a browser: chromium and chromium-driver of Debian, or any that selenium finds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from ddkit.cli._views import leaderboard_view
from ddkit.reporting.html import write_html
from ddkit.reporting.leaderboard import build
from ddkit.reporting.page import gather
from ddkit.reporting.quality import quality_of
from ddkit.results import RESULTS_FILE, read
from ddkit.runtime.files import write_text
from ddkit.sets.contact_sheet import save_png

_COLUMNS = 150  # of the terminal: the full table of the leaderboard
_DESKTOP = (1120, 1000)  # pixels


def save_terminal(folder: Path, path: Path) -> None:
    """`ddkit report` as a terminal shows it."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print("[bold]$ ddkit report[/bold]")
    console.print(leaderboard_view(build(read(folder / RESULTS_FILE).results), console))
    # Without fonts from elsewhere: a picture asks nobody for anything.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    write_text(path, console.export_svg(title="ddkit report", code_format=template))


@contextlib.contextmanager
def browser(dark: bool) -> Iterator[webdriver.Chrome]:
    """A browser without a window, at desktop width."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    width, height = _DESKTOP
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        yield driver
    finally:
        driver.quit()


def save_page(page: Path, path: Path, *, start: str, height: int, dark: bool = False) -> None:
    """So much of the page from the element `start` (a CSS selector) on."""
    with browser(dark) as driver:
        driver.get(page.as_uri())
        top = driver.find_element(By.CSS_SELECTOR, start).location["y"]
        clip = {"x": 0, "y": max(0, top - 24), "width": _DESKTOP[0], "height": height, "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    save_png(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(".github/images"))
    parser.add_argument("--quality", type=Path, help="a set whose pictures are measured, relative to FOLDER")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    # Paths in the results are relative to the folder they were made in.
    os.chdir(arguments.folder)
    quality = [quality_of(arguments.quality)] if arguments.quality else []
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "report.html"
        write_html(gather(read().results, quality=quality), page)
        save_terminal(Path(), out / "leaderboard.svg")
        save_page(page, out / "report.png", start="header", height=1180)
        save_page(page, out / "report-entry.png", start="#entries", height=358, dark=True)
        if quality:
            save_page(page, out / "report-quality.png", start="#quality", height=900)
    for path in sorted(out.iterdir()):
        print(f"{path.relative_to(out.parent)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
