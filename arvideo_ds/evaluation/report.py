"""One HTML file that shows a run: numbers, loss, probes, predictions. Needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd;
text-align: left }} img {{ max-width: 100%; border: 1px solid #eee; margin: .4em 0 }}
.note {{ color: #555 }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def section(title: str, note: str, figures: Iterable[Figure] = ()) -> str:
    """A heading, a paragraph, and figures as embedded PNGs."""
    images = "".join(f'<img alt="{html.escape(title)}" src="{_data_url(f)}">' for f in figures)
    return f'<h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{images}'


def table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    path.write_text(_PAGE.format(title=html.escape(title), body="".join(parts)), encoding="utf-8")


def _data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
