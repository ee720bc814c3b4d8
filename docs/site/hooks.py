"""Hooks of mkdocs: equations without a script of the reader's, and links to files of the checkout.

Equations become MathML while the site is built, so that pages need neither network nor JavaScript.
A link out of docs/, which GitHub shows, becomes a link to the repository where mkdocs.yml has
`repo_url`, else plain text; a file that does not exist fails the build.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Links to files outside docs/."""
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(docs):
            return found[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist.")
        place = path.relative_to(docs.parent).as_posix()
        repository = config["repo_url"]
        return f"[{text}]({repository}/blob/main/{place})" if repository else f"`{place}`"

    return _OUTSIDE.sub(link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX of arithmatex as MathML."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return _MATH.sub(mathml, content)
