"""Whatever writes shards has its folder to itself: two writers never delete each other's files."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL
from arvideo_ds.files.locks import LOCK, lock
from arvideo_ds.shards.datasets import Entry, Listing
from arvideo_ds.shards.foreign import index_shards
from arvideo_ds.shards.reshard import merged, open_pool, write_part
from arvideo_ds.shards.staging import stage
from arvideo_ds.shards.writer import ShardJob, write_shards
from tests.conftest import ROOT, run_script


def job(output: Path) -> ShardJob:
    """An output of one video that does not decode, which is enough to get to the writing."""
    path = output.parent / "x.mp4"
    path.write_bytes(b"")
    return ShardJob(
        dataset="folder",
        split=None,
        listing=Listing((Entry("x", path, "x.mp4", None),), None),
        output=output,
        transcode=None,
        samples_per_shard=1,
        seed=0,
        workers=1,
        timeout_s=60.0,
    )


def _write_part(demo: Path, output: Path) -> None:
    pool = open_pool([demo / "train"], 0)
    write_part(pool, merged(pool, output), how="all", samples_per_shard=10)


def _index(demo: Path, output: Path) -> None:
    output.mkdir(exist_ok=True)
    (output / "a.tar").write_bytes(bytes(10240))
    index_shards(output, dataset="webdataset", workers=1, timeout_s=60.0)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "make_shards": lambda demo, output: write_shards(job(output)),
    "reshard": _write_part,
    "index_shards": _index,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_writer_is_refused_and_deletes_nothing(
    demo_shards: Path, tmp_path: Path, writer: str
) -> None:
    output = tmp_path / "out"
    with lock(output):
        half = output / f"folder-000000.tar{PARTIAL}"
        half.write_bytes(b"what the first is writing now")
        with pytest.raises(UserError, match="another run") as refused:
            WRITERS[writer](demo_shards, output)
        assert half.exists()
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert str(output) in str(refused.value)


def test_a_second_staging_waits_until_the_folder_is_free(demo_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with lock(output):
        second = threading.Thread(target=stage, args=(demo_shards / "train", output, 1))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        assert [path.name for path in output.iterdir()] == [LOCK]
    second.join(60)
    assert sorted(output.glob("*.tar"))


@pytest.mark.parametrize("script", ["make_shards", "reshard", "stage", "inspect_shards"])
def test_an_output_that_cannot_be_made_is_one_paragraph_and_exit_code_2(
    demo_shards: Path, tmp_path: Path, script: str
) -> None:
    blocked = tmp_path / "file" / "out"
    blocked.parent.write_text("")
    options: dict[str, tuple[str | Path, ...]] = {
        "make_shards": (
            "make_shards.py",
            "--dataset",
            "folder",
            "--videos",
            demo_shards / "videos",
        ),
        "reshard": ("reshard.py", demo_shards / "test"),
        "stage": ("reshard.py", demo_shards / "test", "--stage"),
        "inspect_shards": ("inspect_shards.py", demo_shards / "test"),
    }
    name, *arguments = options[script]
    done = run_script(ROOT / "data_tools" / name, *arguments, "--output", blocked)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert str(blocked) in line
    assert "Not a directory" in line
