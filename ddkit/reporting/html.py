"""The report as one HTML file that brings everything along: no request to anywhere, readable without JavaScript."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ddkit.reporting.formatting import LEGEND, percent, points
from ddkit.reporting.page import Page
from ddkit.reporting.rows import dataset_title
from ddkit.runtime.files import write_text

if TYPE_CHECKING:
    import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def render(page: Page) -> str:
    """The page's HTML. Every text that comes from results or files is escaped."""
    environment = _environment()
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        page=page,
        legend=LEGEND,
        script=script,
        # Only the script that we wrote runs, whatever a class name or a JSON file may hold.
        script_hash=_hash_source(script),
    )


def write_html(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page's HTML, atomically."""
    write_text(path, render(page))


def _hash_source(script: str) -> str:
    """The script's hash as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, points=points, dataset_title=dataset_title)
    return environment
