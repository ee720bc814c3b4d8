"""One writer per folder: the lock ends with its process, and says which process has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import LOCK, lock


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with lock(folder):
        with pytest.raises(UserError, match="another run") as raised:
            lock(folder)
        assert str(folder) in str(raised.value)
        lock(tmp_path / "runs" / "other").close()
    lock(folder).close()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from arvideo_ds.files.locks import lock\n"
        f"held = lock(Path({str(tmp_path)!r})); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on "):
            lock(tmp_path)
        other.kill()
    lock(tmp_path).close()
    # Two folders with the same content stay equal, however their writers ended.
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_file_system_without_locks_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("arvideo_ds.files.locks.fcntl.flock", unsupported)
    with pytest.raises(UserError, match=r"no file locks \(Function not implemented\)"):
        lock(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """Such as token scores beside shards that others own."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write to .*Not a directory.*choose another folder"
    ):
        lock(tmp_path / "file" / "scores")
