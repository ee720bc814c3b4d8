"""The README's table of predicted costs: what the recipes and the adviser say today."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arvideo_ds.cli import costs as command
from arvideo_ds.planning.costs import END, START, replaced
from tests.conftest import ROOT


def test_the_table_in_the_readme_is_what_is_predicted_today(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["arvideo costs", "--check"])
    assert command.main() == 0, capsys.readouterr().err


def test_a_stale_table_is_reported_and_replaced_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cost_table", lambda base: "| new |\n")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{START}| old |\n{END}after\n")
    monkeypatch.setattr(sys, "argv", ["arvideo costs", "--check", "--readme", str(page)])
    assert command.main() == 1
    assert "| old |" in page.read_text()
    sys.argv.remove("--check")
    assert command.main() == 0
    assert page.read_text() == f"before\n{START}| new |\n{END}after\n"


def test_a_page_without_the_marks_is_not_written() -> None:
    with pytest.raises(ValueError, match="no table between"):
        replaced("a page\n", "| new |\n")


def test_more_and_faster_gpus_take_fewer_hours() -> None:
    """Rows are sizes, columns machines, from the smallest to the largest."""
    _, rest = (ROOT / "README.md").read_text(encoding="utf-8").split(START)
    rows = rest.split(END)[0].splitlines()[2:]
    hours = [[float(c.split(" h")[0].replace(",", "")) for c in r.split("|")[2:-1]] for r in rows]
    assert len(hours) == 5
    for row in hours:
        assert row == sorted(row, reverse=True)
    for column in zip(*hours, strict=True):
        assert list(column) == sorted(column)
