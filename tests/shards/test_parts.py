"""Shards written in parts: the bytes of one process, and no two processes in one part."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from arvideo_ds.cli import shards as command
from arvideo_ds.decoding.processes import Failed
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError
from arvideo_ds.files import locks
from arvideo_ds.files.atomic import PARTIAL
from arvideo_ds.files.locks import LOCK, lock
from arvideo_ds.shards import parts, writer
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST
from arvideo_ds.shards.parts import Part, parse_part
from arvideo_ds.shards.writer import ShardJob, finish_parts, write_part, write_shards

FOUR = [Part(number, 4) for number in (1, 2, 3, 4)]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that can be killed take longer to start than these videos to read."""

    def ingest_here(
        function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], **_: object
    ) -> Iterator[Any]:
        for each in arguments:
            try:
                yield function(*each)
            except RejectedError as error:
                yield Failed(error.reason, error.message, rejected=True)

    monkeypatch.setattr(writer, "killable_map", ingest_here)
    monkeypatch.setattr(locks, "_POLL_S", 0.05)


@pytest.fixture(scope="module")
def videos(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos in two classes, an empty one and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for label in ("east", "west"):
        (folder / label).mkdir()
        for source in sorted((demo_shards / "videos" / "train" / label).glob("*.mp4"))[:6]:
            shutil.copy(source, folder / label)
    (folder / "east" / "zero.mp4").write_bytes(b"")
    (folder / "west" / "text.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def job(videos: Path, tmp_path: Path) -> ShardJob:
    """Seven shards."""
    return ShardJob(
        dataset="folder",
        split=None,
        listing=read_listing("folder", Source(videos)),
        output=tmp_path / "out",
        transcode=None,
        samples_per_shard=2,
        seed=0,
        workers=1,
        timeout_s=60.0,
    )


@pytest.fixture
def whole(job: ShardJob, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    write_shards(replace(job, output=tmp_path / "whole"))
    return contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_in_any_order_write_the_bytes_of_one_process(
    job: ShardJob, whole: dict[str, bytes]
) -> None:
    """Every file, so no lock or partial file is left either; a repeated part changes nothing."""
    for part in (FOUR[2], FOUR[0], FOUR[3], FOUR[0]):
        report = write_part(job, part)
        assert report.whole is None
        assert not (job.output / MANIFEST).exists()
    assert report.shards_kept == len(report.indices) == 2
    assert report.num_missing == 2
    with pytest.raises(UserError, match=r"2 of 7 shards .*-000001\.tar\. Repeat part 2 of 4"):
        finish_parts(job)
    assert not (job.output / MANIFEST).exists()
    report = write_part(job, FOUR[1])
    assert report.whole is not None
    assert (report.whole.shards_kept, report.whole.manifest.num_rejects) == (0, 2)
    assert contents(job.output) == whole
    assert finish_parts(job).manifest == report.whole.manifest
    assert contents(job.output) == whole


def test_parts_write_disjoint_shards_that_are_all_shards() -> None:
    names = list("abcdefghijk")
    for total in (1, 2, 5, 11, 16):
        taken = [Part(number, total).of(names) for number in range(1, total + 1)]
        assert sorted(itertools.chain(*taken)) == names
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_the_number_of_parts_may_change_and_no_part_may_be_used(
    job: ShardJob, whole: dict[str, bytes]
) -> None:
    write_part(job, Part(2, 3))
    kept = {path.name: path.stat().st_mtime_ns for path in job.output.glob("*.tar")}
    assert len(kept) == 2
    write_part(job, Part(1, 2))
    with pytest.raises(UserError, match="Repeat part 2 of 2"):
        finish_parts(job)
    assert write_shards(job).shards_kept == 5
    assert contents(job.output) == whole
    assert kept == {name: (job.output / name).stat().st_mtime_ns for name in kept}


def test_parts_that_end_together_leave_a_whole_manifest(
    job: ShardJob, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of two last parts find all shards complete, and end them at the same time."""
    together, real = threading.Barrier(2), writer.missing_shards

    def at_the_same_time(*arguments: Any) -> list[str]:
        together.wait(10)
        return real(*arguments)

    for part in FOUR[:2]:
        write_part(job, part)
    monkeypatch.setattr(writer, "missing_shards", at_the_same_time)
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda part: write_part(job, part), FOUR[2:]))
    assert any(report.whole for report in reports)
    finish = [threading.Thread(target=finish_parts, args=(job,)) for _ in range(2)]
    for thread in finish:
        thread.start()
    for thread in finish:
        thread.join(20)
    left = contents(job.output)
    assert whole.items() <= left.items()
    # One that ends may have kept another from removing the locks.
    assert all(name.startswith(LOCK) for name in left.keys() - whole.keys())


def test_all_parts_at_once_end_with_the_manifest(job: ShardJob, whole: dict[str, bytes]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda part: write_part(job, part), FOUR))
    assert whole.items() <= contents(job.output).items()


class Running:
    """A part that waits before its first video, with a partial file."""

    def __init__(self, job: ShardJob, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        real = writer.killable_map

        def waiting(*arguments: Any, **options: Any) -> Iterator[Any]:
            self.started.set()
            self.go_on.wait(20)
            yield from real(*arguments, **options)

        monkeypatch.setattr(writer, "killable_map", waiting)
        self.thread = threading.Thread(target=write_part, args=(job, part))
        self.thread.start()
        assert self.started.wait(10)
        monkeypatch.setattr(writer, "killable_map", real)
        name = job.shard_names[part.number - 1]
        self.partial = job.output / (name + PARTIAL)
        assert self.partial.exists()

    def end(self) -> None:
        self.go_on.set()
        self.thread.join(20)


def test_a_running_part_keeps_out_all_but_the_other_parts(
    job: ShardJob, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same part, another number of parts, other settings, and a command without parts."""
    running = Running(job, FOUR[0], monkeypatch)
    other = replace(job, seed=1)
    refused: list[tuple[str, Callable[[], object]]] = [
        (r"another run \(process .*\) is writing part 1/4 to ", lambda: write_part(job, FOUR[0])),
        (
            r"process .* is writing part 1/4 to .*, not one of 3",
            lambda: write_part(job, Part(1, 3)),
        ),
        ("part 1/4 .* with other videos, labels, settings", lambda: write_part(other, FOUR[1])),
        ("perhaps in parts", lambda: write_shards(job)),
    ]
    try:
        for message, start in refused:
            with pytest.raises(UserError, match=message):
                start()
        assert not list(job.output.glob("*.tar"))
        for part in FOUR[1:]:
            assert write_part(job, part).whole is None
        assert running.partial.exists()
        with pytest.raises(UserError, match=r"2 of 7 .* part 1 of 4, except those that still run"):
            finish_parts(job)
    finally:
        running.end()
    assert contents(job.output) == whole


def test_a_command_without_parts_keeps_parts_out(job: ShardJob) -> None:
    with lock(job.output):
        for start in (lambda: write_part(job, FOUR[0]), lambda: finish_parts(job)):
            with pytest.raises(UserError, match="another run"):
                start()
        assert [path.name for path in job.output.iterdir()] == [LOCK]


def test_a_part_with_other_settings_than_earlier_parts_is_refused(job: ShardJob) -> None:
    write_part(job, FOUR[0])
    before = contents(job.output)
    other = replace(job, seed=1)
    for start in (lambda: write_part(other, FOUR[1]), lambda: finish_parts(other)):
        with pytest.raises(UserError, match="shards of other videos, labels or settings"):
            start()
    shards = [name for name in contents(job.output) if not name.startswith(LOCK)]
    assert sorted(shards) == sorted(name for name in before if not name.startswith(LOCK))


def test_a_part_needs_space_for_its_own_shards_alone(
    job: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(writer, "require_space", lambda _, num_bytes: needed.append(num_bytes))
    for part in FOUR:
        write_part(job, part)
    assert min(needed) > 0
    assert sum(needed) == sum(entry.path.stat().st_size for entry in job.listing.entries)


def test_the_bar_counts_the_shards_of_all_parts(
    job: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part(job, FOUR[0])
    monkeypatch.setattr(parts, "_LISTING_EVERY_S", 0.0)
    progress = parts.Progress(job.output, job.shard_names)
    with tqdm(disable=False, file=sys.stdout) as bar:
        progress.show(bar)
        assert bar.postfix == "all parts 2/7 shards"
        write_part(job, FOUR[1])
        time.sleep(0.01)
        progress.show(bar)
        assert bar.postfix.startswith("all parts 4/7 shards, ")
        monkeypatch.setattr(parts, "_LISTING_EVERY_S", 30.0)
        time.sleep(0.1)
        progress.show(bar)
        monkeypatch.setattr(parts, "missing_shards", None)  # not listed again so soon
        progress.show(bar)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "-1/4", "1/0", "1/2/3", "a/b", "1.0/4"])
def test_a_wrong_part_is_one_paragraph(text: str) -> None:
    with pytest.raises(UserError, match=r"--part .* from 1/8 to 8/8, or slurm"):
        parse_part(text)


def test_a_part_comes_from_the_tasks_of_srun_only_on_request() -> None:
    """A batch script, and a shell in an allocation, have SLURM_NTASKS and SLURM_PROCID as well."""
    batch = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert parse_part("slurm", {**batch, "SLURM_STEP_NUM_TASKS": "8"}) == Part(1, 8)
    assert parse_part("2/3", {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}) == Part(2, 3)
    with pytest.raises(UserError, match=r"\$SLURM_ARRAY_TASK_ID/8"):
        parse_part("slurm", batch)


@pytest.fixture
def call(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Calls the command: exit code, standard output and error."""

    def call(*options: str, output: str = "parts") -> tuple[int, str, str]:
        arguments = ["--dataset", "folder", "--videos", str(videos), "--video", "copy"]
        arguments += ["--samples_per_shard", "4", "--output", str(tmp_path / output), *options]
        monkeypatch.setattr(sys, "argv", ["arvideo shards", *arguments])
        return command.main(), *capsys.readouterr()

    return call


def test_the_command_counts_all_parts_and_ends_as_one_process_does(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = call("--part", "2/2")
    assert code == 0
    assert "part 2/2 is complete: " in out
    assert "all parts: 2 of 4 shards" in out
    code, _, err = call("--finish")
    assert code == 2
    assert "Repeat part 1 of 2" in err
    code, last, _ = call("--part=1/2")
    assert code == 3  # of the whole set, as of one process
    whole = call(output="whole")
    summary = whole[1].replace(str(tmp_path / "whole"), str(tmp_path / "parts"))
    assert (code, summary) == call("--finish")[:2]
    assert last.endswith(summary[summary.index(str(tmp_path)) :])
    assert call("--part", "0/2")[0] == 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_part_leaves_no_partial_file_and_is_repeated(
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    real = writer.killable_map

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for count, result in enumerate(real(*arguments, **options)):
            if count == 5:
                assert list((tmp_path / "parts").glob(f"*{PARTIAL}"))
                os.kill(os.getpid(), number)
            yield result

    monkeypatch.setattr(writer, "killable_map", interrupted)
    assert call("--part=1/2")[0] == 75
    assert len(list((tmp_path / "parts").glob("*.tar"))) == 1
    assert not list((tmp_path / "parts").glob(f"*{PARTIAL}"))
    monkeypatch.setattr(writer, "killable_map", real)
    code, out, _ = call("--part=1/2")
    assert code == 0
    assert "2 shards, 1 of them from an earlier run" in out
