"""The documentation: links, the site, what the code cites, and the language."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "demo.ipynb"
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
        pytest.importorskip(package, reason="the extra `docs`: make setup")
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


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [c["id"] for c in code if c["outputs"] or c["execution_count"] is not None] == []


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, on fewer videos and steps."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="the extra `docs`: make setup")
    import nbformat
    from nbclient import NotebookClient

    text = NOTEBOOK.read_text(encoding="utf-8")
    for full, short in (
        ("max_steps=1000", "max_steps=40"),
        ("80), (", "20), ("),
        (" 40))", " 20))"),
    ):
        assert text.count(full) == 1, full
        text = text.replace(full, short)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.reads(text, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert "data:image/png" in (tmp_path / "runs/notebook/run/report.html").read_text()
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert '"linear_probe_accuracy"' in printed
    assert "the same motion in" in printed


def sources() -> Iterator[Path]:
    for folder in ("arvideo_ds", "scripts", "data_tools", "tests", "docs"):
        for kind in ("*.py", "*.md", "*.yaml"):
            yield from (ROOT / folder).rglob(kind)


def test_nothing_cites_notes_that_readers_do_not_have() -> None:
    notes = re.compile(r"\b(?:METHOD|LVMAE|ARCHITECTURE|DATA|STYLE)(?:\.md\b|, section)|\bMETHOD\b")
    here = Path(__file__)
    citing = [p for p in sources() if p != here and notes.search(p.read_text(encoding="utf-8"))]
    assert citing == []


# What the field does not write, and what it writes instead.
PHRASES = {
    r"(?<!there )\b(?:is|are) no\b(?! longer)": "is not a ..., without a ...",
    r"\b(?:stands?|lies?) (?:in|on|at|beside|for)\b": "is in",
    r"\bholds? (?:the|an?|all|every|its|their|\d+)\b": "contains, has",
    r"\b(?:of|from|on) those that (?:it|they) go(?:es)?\b|\bgoes on from\b": "resumes from",
    r"\b(?:said|told|asked|wanted)\b": "reported; test; target",
    r"\bpeople's way\b|\bno use to\b|\bnobody\b|\banybody\b|\bsomebody\b": "name it",
    r"\bone view a video\b|\bsteps done in all\b": "one view per video, total steps",
    r"\bleft out\b|\blaid over\b|\bdealt to\b": "excluded, overrides, assigned to",
    r"\bneighbours ask\b": "k-NN probe",
    r"\bgives? up\b": "times out, stops",
}


def texts() -> Iterator[tuple[Path, str]]:
    """The documentation, and all docstrings, errors and other texts of the package."""
    for page in PAGES:
        yield page, page.read_text(encoding="utf-8")
    for path in (ROOT / "arvideo_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


def test_texts_are_in_the_plain_english_of_the_field() -> None:
    listed = [(path, " ".join(text.split())) for path, text in texts()]
    for pattern, instead in PHRASES.items():
        banned = re.compile(pattern, re.IGNORECASE)
        found = [
            f"{path.relative_to(ROOT)}: ...{text[max(0, m.start() - 40) : m.end() + 20]}..."
            for path, text in listed
            for m in banned.finditer(text)
        ]
        assert found == [], f"write instead: {instead}"
