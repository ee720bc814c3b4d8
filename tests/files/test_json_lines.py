"""Files that are appended to while a program may be killed: nothing torn stops the next start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arvideo_ds.files.json_lines import append_json_lines, read_json_lines
from arvideo_ds.runs.run_folder import METRICS, excluded_videos, read_metrics


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00\x00\x00", b"\xff\xfe{", b"3", b"[]"])
def test_a_torn_line_inside_is_skipped_with_its_place(
    torn: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 3}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    read_metrics(tmp_path)
    told = capsys.readouterr().err
    assert told.count("note:") == 1, "every reader of a start would say it again"
    assert f"{path}: 1 line(s)" in told
    assert "line 2" in told


def test_a_torn_last_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "quarantine-rank-00000.jsonl"
    path.write_text('{"key": "a", "kind": "hang"}\n{"key": "b", "ki')
    append_json_lines(path, [{"key": "c", "kind": "crash"}])
    assert excluded_videos(tmp_path) == {"a": "hang", "c": "crash"}


def test_the_one_file_of_older_runs_is_read_although_lines_are_torn(tmp_path: Path) -> None:
    text = '{"key": "a", "kind": "hang"}\n{"key": "b", "kind": "ha{"key": "c", "kind": "hang"}\n'
    (tmp_path / "quarantine.jsonl").write_text(text + '{"kind": "hang"}\n{"key": "d"}\n')
    assert excluded_videos(tmp_path) == {"a": "hang"}


def test_each_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = os.write
    monkeypatch.setattr(
        os, "write", lambda file, data: (written.append(data), write(file, data))[1]
    )
    append_json_lines(tmp_path / "x.jsonl", [{"a": 1}, {"b": "c\nd"}])
    assert [json.loads(data) for data in written] == [{"a": 1}, {"b": "c\nd"}]
    assert all(data.endswith(b"\n") for data in written)
    assert read_json_lines(tmp_path / "x.jsonl") == [{"a": 1}, {"b": "c\nd"}]
