"""The report as one self-contained HTML file, which needs neither the network nor JavaScript."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from ddkit.errors import counted
from ddkit.reporting.formatting import percent, points
from ddkit.reporting.page import Page
from ddkit.reporting.rows import dataset_title
from ddkit.runtime.files import write_text
from ddkit.runtime.html import data_uri

_TEMPLATES = Path(__file__).parent / "templates"


def render(page: Page) -> str:
    """The page's HTML. All text that comes from results or files is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        counted=counted,
        percent=percent,
        points=points,
        dataset_title=dataset_title,
        data_uri=data_uri,
        file_uri=lambda path: Path(path).resolve().as_uri(),
    )
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        page=page,
        script=script,
        # Only this script runs, even if a class name or a JSON file holds another.
        script_hash=f"'sha256-{script_hash}'",
    )


def write_html(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page's HTML, atomically."""
    write_text(path, render(page))
