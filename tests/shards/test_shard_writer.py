"""make_shards.py for real: nothing lost unsaid, the same bytes however it ran, plain WebDataset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from arvideo_ds.decoding.video import TranscodeSettings, probe
from arvideo_ds.shards.datasets import Entry, Listing, Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST, REJECTS, ShardSet
from arvideo_ds.shards.writer import ShardJob, write_shards
from tests import warm_start
from tests.conftest import ROOT, command_environment, run_command, run_script

# make test does a few; the figure of ten is ARVIDEO_KILLS=10.
KILLS = int(os.environ.get("ARVIDEO_KILLS", "3"))

SCRIPT = ROOT / "data_tools" / "make_shards.py"
SETTINGS = ("--short_side", "32", "--samples_per_shard", "5")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_shards(
    videos: Path, output: Path, *options: str, settings: tuple[str, ...] = SETTINGS
) -> subprocess.CompletedProcess[str]:
    return run_script(*arguments(videos, output, settings), *options)


def arguments(videos: Path, output: Path, settings: tuple[str, ...]) -> list[str | Path]:
    return [SCRIPT, "--dataset", "folder", "--videos", videos, "--output", output, *settings]


def start(videos: Path, output: Path, settings: tuple[str, ...]) -> warm_start.Process:
    with Path(os.devnull).open("w") as nothing:
        return warm_start.start(
            arguments(videos, output, settings),
            cwd=ROOT,
            env=command_environment(),
            stdout=nothing.fileno(),
            stderr=nothing.fileno(),
        )


@pytest.fixture(scope="module")
def videos(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve demo videos in two classes, with an empty and a cut file among them."""
    folder = tmp_path_factory.mktemp("videos")
    for label in ("east", "west"):
        sources = sorted((demo_shards / "videos" / "train" / label).glob("*.mp4"))
        (folder / label).mkdir()
        for source in sources[:6]:
            shutil.copy(source, folder / label)
    whole = next((folder / "east").glob("*.mp4")).read_bytes()
    (folder / "east" / "zero.mp4").write_bytes(b"")
    (folder / "east" / "moving.gif").write_bytes(b"GIF89a")
    (folder / "west" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


def test_the_help_says_every_default_and_where_the_data_sets_are_described() -> None:
    said = " ".join(run_script(SCRIPT, "--help").stdout.split())
    assert "docs/datasets.md" in said
    for default in ("transcode", 256, 8, 23, 500, 0, 120, 0.05, 3.0):
        assert f"default {default}" in said


@pytest.fixture(scope="module")
def one_worker(
    videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("one")
    return output, make_shards(videos, output, "--workers", "1")


def test_what_is_left_out_is_listed_counted_and_told_by_the_exit_code(
    one_worker: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, done = one_worker
    assert done.returncode == 3, done.stderr
    rejects = [json.loads(line) for line in (output / REJECTS).read_text().splitlines()]
    reasons = {reject["source_path"]: reject["reason"] for reject in rejects}
    assert reasons == {"east/zero.mp4": "empty", "west/cut.mp4": "cannot_open"}
    assert all(reject["message"] for reject in rejects)
    manifest = ShardSet(output).manifest
    assert (manifest.num_samples, manifest.num_rejects) == (12, 2)
    assert sum(shard.samples for shard in manifest.shards) == 12
    assert f"{output}: 12 videos in 3 shards" in done.stdout
    assert "2 labels" in done.stdout
    assert "rejected: 2 (" in done.stdout
    assert "1 empty" in done.stdout
    # Before the work and after it.
    assert done.stdout.count("1 files passed over") == done.stdout.count(".gif 1") == 2


def test_workers_change_no_byte_and_a_larger_share_may_be_left_out(
    videos: Path, one_worker: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = make_shards(videos, tmp_path, "--workers", "2", "--max_reject_share", "1")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(one_worker[0])


def test_other_settings_never_enter_a_folder_that_has_shards(
    videos: Path, one_worker: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    output, _ = one_worker
    before = contents(output)
    other = ("--short_side", "48", "--samples_per_shard", "5")
    done = make_shards(videos, output, settings=other)
    assert done.returncode == 2
    assert str(output) in done.stderr
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(output) == before


def test_plain_webdataset_reads_every_sample_with_its_facts(
    videos: Path, one_worker: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    output, _ = one_worker
    shards = ShardSet(output)
    paths = [str(output / shard.name) for shard in shards.manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    indexed = [
        (number, sample) for number in range(len(paths)) for sample in shards.index(number).samples
    ]
    assert [sample["__key__"] for sample in samples] == [sample.key for _, sample in indexed]
    for sample, (number, entry) in zip(samples, indexed, strict=True):
        facts = json.loads(sample["json"])
        video = sample["mp4"]
        assert video == shards.read(number, entry)
        assert facts["sha256"] == hashlib.sha256(video).hexdigest()
        assert facts["bytes"] == len(video)
        assert facts["num_frames"] == entry.num_frames == probe(io.BytesIO(video)).num_frames
        assert facts["label_name"] == facts["video_id"].partition("/")[0]
        assert shards.manifest.labels is not None
        assert shards.manifest.labels[facts["label"]] == facts["label_name"]
        assert entry.label == facts["label"]
        assert (videos / facts["source_path"]).is_file()
    for number, shard in enumerate(shards.manifest.shards):
        tar = (output / shard.name).read_bytes()
        assert hashlib.sha256(tar).hexdigest() == shard.sha256 == shards.index(number).shard_sha256


def test_no_usable_video_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(2):
        (videos / f"{number}.mp4").write_bytes(b"")
    done = make_shards(videos, tmp_path / "out", "--workers", "1")
    assert done.returncode == 2
    assert "none of the 2 videos is usable (2 empty)" in done.stderr
    assert REJECTS in done.stderr
    assert "Traceback" not in done.stderr


def shard_job(listing: Listing, output: Path, **changes: object) -> ShardJob:
    settings: dict[str, object] = {
        "dataset": "folder",
        "split": None,
        "transcode": TranscodeSettings(short_side=32),
        "samples_per_shard": 5,
        "seed": 0,
        "workers": 2,
        "timeout_s": 60.0,
    }
    return ShardJob(listing=listing, output=output, **{**settings, **changes})  # type: ignore[arg-type]


def test_a_video_that_hangs_is_killed_and_costs_no_other(videos: Path, tmp_path: Path) -> None:
    # Nobody ever writes into the pipe, so reading it hangs in native code for good.
    pipe = tmp_path / "hangs.mp4"
    os.mkfifo(pipe)
    listing = read_listing("folder", Source(videos / "east"))
    hangs = Entry(video_id="hangs", path=pipe, source_path="hangs.mp4", label_name=None)
    listing = replace(listing, entries=(*listing.entries, hangs))
    report = write_shards(shard_job(listing, tmp_path / "out", timeout_s=4.0))
    assert report.manifest.num_samples == 6
    assert report.rejects_by_reason == {"timeout": 1, "empty": 1}
    rejects = (tmp_path / "out" / REJECTS).read_text()
    assert '"source_path": "hangs.mp4", "reason": "timeout"' in rejects


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(
    demo_shards: Path, tmp_path: Path
) -> None:
    videos = demo_shards / "videos" / "train"
    settings = ("--short_side", "32", "--samples_per_shard", "2", "--workers", "1")
    assert make_shards(videos, tmp_path / "whole", settings=settings).returncode == 0
    killed = tmp_path / "killed"
    process = start(videos, killed, settings)
    try:
        limit = time.monotonic() + 60
        while len(list(killed.glob("*.index.json"))) < 3 and time.monotonic() < limit:
            time.sleep(0.001)
    finally:
        process.kill_session()
    complete = {path.name for path in killed.glob("*.index.json")}
    assert len(complete) >= 3
    assert not (killed / MANIFEST).exists()
    written = {name: (killed / name).stat().st_mtime_ns for name in complete}
    (killed / "folder-000023.tar.partial").write_bytes(b"half a shard")
    done = make_shards(videos, killed, settings=settings)
    assert done.returncode == 0, done.stderr
    assert f"{len(complete)} of them from an earlier run" in done.stdout
    assert written == {name: (killed / name).stat().st_mtime_ns for name in complete}
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(
    demo_shards: Path, tmp_path: Path
) -> None:
    videos = demo_shards / "videos" / "train"
    settings = ("--short_side", "32", "--samples_per_shard", "2", "--workers", "2")
    started = time.monotonic()
    assert make_shards(videos, tmp_path / "whole", settings=settings).returncode == 0
    whole_s = time.monotonic() - started
    killed = tmp_path / "killed"
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(videos, killed, settings)
        try:
            process.wait(moments.uniform(0, 1.1 * whole_s))
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill_session()
    assert make_shards(videos, killed, settings=settings).returncode == 0
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    demo_shards: Path, tmp_path: Path
) -> None:
    videos = demo_shards / "videos" / "train"
    settings = ("--short_side", "0", "--samples_per_shard", "4")
    assert make_shards(videos, tmp_path / "whole", settings=settings).returncode == 0
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    small = tmp_path / "small"
    small.mkdir()
    mounted = run_command("mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", small)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        full = make_shards(videos, small / "out", settings=settings)
        assert full.returncode == 2
        assert "is full" in full.stderr
        assert "Traceback" not in full.stderr
        run_command("mount", "-o", f"remount,size={4 * size}", small)
        assert make_shards(videos, small / "out", settings=settings).returncode == 0
        assert contents(small / "out") == contents(tmp_path / "whole")
    finally:
        run_command("umount", small)


def test_a_shard_lost_or_cut_after_the_run_is_made_again(videos: Path, tmp_path: Path) -> None:
    listing = read_listing("folder", Source(videos / "west"))
    job = shard_job(listing, tmp_path, transcode=None, samples_per_shard=2, workers=1)
    write_shards(job)
    before = contents(tmp_path)
    first, second, *_ = sorted(tmp_path.glob("*.tar"))
    first.unlink()
    with second.open("r+b") as file:
        file.truncate(1024)
    write_shards(job)
    assert contents(tmp_path) == before


def test_layers_are_those_of_the_data_set_unless_chosen(
    videos: Path, one_worker: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    layered = ShardSet(one_worker[0])
    assert layered.layers == layered.manifest.settings["layers"] == 4
    assert layered.manifest.settings["gop"] == 32
    options = ("--max_reject_share", "1", "--workers", "1")
    assert make_shards(videos, tmp_path / "plain", "--layers", "1", *options).returncode == 0
    plain = ShardSet(tmp_path / "plain")
    assert plain.layers == 1 and plain.manifest.settings["gop"] == 8
    assert "layers" not in plain.manifest.settings, "shards of earlier versions keep their hashes"
    done = make_shards(videos, tmp_path / "no", "--layers", "4", "--gop", "10")
    assert done.returncode == 2 and "positive multiple" in done.stderr
