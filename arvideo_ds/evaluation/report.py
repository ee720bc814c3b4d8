"""One HTML file that shows a run: numbers, loss, probes, predictions. Needs no other file."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and figures."""

    title: str
    note: str
    figures: Sequence[Figure] = ()

    @cached_property
    def pngs(self) -> list[bytes]:
        """The figures as PNG files; drawn once, since a second layout may differ."""
        return [_png(figure) for figure in self.figures]

    def html(self) -> str:
        """The section with its figures embedded."""
        title = html.escape(self.title)
        urls = ["data:image/png;base64," + base64.b64encode(png).decode() for png in self.pngs]
        images = "".join(f'<img alt="{title}" src="{url}">' for url in urls)
        return f'<h2>{title}</h2><p class="note">{html.escape(self.note)}</p>{images}'

    def save(self, folder: Path) -> None:
        """Write the figures as files named after the title, such as predictions_2.png."""
        stem = re.sub(r"[^a-z0-9]+", "_", self.title.lower()).strip("_")
        for number, png in enumerate(self.pngs, start=1):
            (folder / f"{stem}_{number}.png").write_bytes(png)


def table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    path.write_text(_PAGE.format(title=html.escape(title), body="".join(parts)), encoding="utf-8")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
