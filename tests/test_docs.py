"""The documentation: links, the site, what the code cites, and the language."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]*)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(prose(page)))
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_the_site_builds_without_warnings_and_fetches_nothing(run: Run, tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package, reason="pip install -e '.[docs]' (make docs)")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    done = run(*command, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'(?:src|href)="(https?:[^"]+\.(?:js|css|woff2?|png|svg))"', path.read_text()
        )
        assert fetched == [], path
    method = (tmp_path / "method.html").read_text(encoding="utf-8")
    equations = re.findall(r"<math.*?</math>", method, re.DOTALL)
    assert len(equations) > 20
    # A command that the converter does not know would remain.
    assert [text for text in equations if "\\" in text] == []
    assert 'class="arithmatex"' not in method


def sources() -> Iterator[Path]:
    for folder in ("arvideo_ds", "scripts", "data_tools", "tests", "docs"):
        for kind in ("*.py", "*.md", "*.yaml"):
            yield from (ROOT / folder).rglob(kind)


def test_nothing_cites_notes_that_readers_do_not_have() -> None:
    notes = re.compile(r"\b(?:METHOD|LVMAE|ARCHITECTURE|DATA|STYLE)(?:\.md\b|, section)|\bMETHOD\b")
    here = Path(__file__)
    citing = [p for p in sources() if p != here and notes.search(p.read_text(encoding="utf-8"))]
    assert citing == []
