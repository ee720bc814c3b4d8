"""Extraction: features are the encoder's own, nothing is lost unsaid, a rerun goes on exactly."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arvideo_ds.config import PretrainRecipe, Recipe
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.decoders import decode
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.extraction import (
    ExtractionJob,
    ExtractionReport,
    extract_features,
    load_encoder,
)
from arvideo_ds.evaluation.features import freeze
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.inputs import list_videos
from arvideo_ds.shards.manifest import ShardSet
from tests import warm_start
from tests.conftest import ROOT, command_environment, run_script

CPU = torch.device("cpu")
Extract = Callable[..., ExtractionReport]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def recipe(tiny: Callable[..., Recipe]) -> Recipe:
    return tiny()


@pytest.fixture
def model(recipe: Recipe, tmp_path: Path) -> Path:
    """A run folder that looks finished."""
    folder = tmp_path / "run"
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    save_file(untrained(recipe).state_dict(), folder / run_folder.MODEL)
    return folder


@pytest.fixture
def videos(demo_shards: Path, tmp_path: Path) -> Path:
    """Six videos of 12 frames in class folders."""
    for path in sorted((demo_shards / "videos" / "test").rglob("*.mp4"))[::8]:
        copy = tmp_path / "videos" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "videos"


@pytest.fixture
def extracted(recipe: Recipe, model: Path, videos: Path, tmp_path: Path) -> Extract:
    """Runs an extraction in this process; `stop_after` videos it is asked to stop."""

    def start(
        output: str = "features_of",
        source: Path = videos,
        stop_after: int | None = None,
        **job: Any,
    ) -> ExtractionReport:
        listing = list_videos(str(source), skip_bad_rows=True)
        asked = iter(range(10**9))
        return extract_features(
            recipe,
            model / run_folder.MODEL,
            ExtractionJob(listing, tmp_path / output, **{"batch": 2, **job}),
            CPU,
            stop=lambda: stop_after is not None and next(asked) >= stop_after,
        )

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["clip", "token", "time"])
def test_features_are_those_of_the_encoder_on_the_same_frames(
    kind: str, recipe: Recipe, model: Path, videos: Path, extracted: Extract, tmp_path: Path
) -> None:
    report = extracted(features=kind, hop=3)
    # Frames 0-7 and 3-10 of 12, and the last 8.
    assert (report.videos, report.windows, report.rejects) == (6, 18, {})
    settings = json.loads((tmp_path / "features_of" / "config.json").read_text())["settings"]
    # As in earlier versions, whose folders must go on.
    assert settings.keys() & {"stride", "hop", "fps"} == {"stride", "hop"}
    encoder = load_encoder(recipe, model / run_folder.MODEL)
    for line in lines(tmp_path / "features_of" / "index.jsonl"):
        saved = np.load(tmp_path / "features_of" / line["file"])
        assert saved["start_frame"].tolist() == [0, 3, 4]
        assert saved["stop_frame"].tolist() == [8, 11, 12]
        np.testing.assert_allclose(saved["stop_s"] - saved["start_s"], 8 / line["fps"], atol=1e-4)
        data = (videos / line["path"]).read_bytes()
        clips = [
            cut(
                decode("pyav", data, np.arange(start, start + 8)),
                view_crop(40, 40, (32, 32)),
                (32, 32),
                flip=False,
            )
            for start in (0, 3, 4)
        ]
        with torch.no_grad():
            tokens = encode_clips(encoder, torch.stack(clips), recipe.patch)
        times, width = recipe.geometry.grid[0], tokens.shape[-1]
        expected = {
            "clip": tokens.mean(1),
            "token": tokens,
            "time": tokens.view(3, times, -1, width).mean(2),
        }[kind]
        assert line["shape"] == list(expected.shape)
        np.testing.assert_allclose(saved["features"], expected.numpy(), atol=1e-5)


def test_a_short_video_gives_what_the_probe_sees(
    tiny: Callable[..., Recipe], model: Path, demo_shards: Path, tmp_path: Path
) -> None:
    recipe = tiny(data={"stride": 2})  # 12 frames are too few for 8 of stride 2
    shards = ShardSet(demo_shards / "test")
    encoder = load_encoder(recipe, model / run_folder.MODEL)
    _, probed = freeze(encoder, recipe, shards, shards).features
    job = ExtractionJob(list_videos(str(demo_shards / "test")), tmp_path / "out")
    extract_features(recipe, model / run_folder.MODEL, job, CPU)
    found = {line["key"]: line for line in lines(tmp_path / "out" / "index.jsonl")}
    names = [s.key for n in range(len(shards.manifest.shards)) for s in shards.index(n).samples]
    for key, values, label in zip(names, probed.values, probed.labels, strict=True):
        assert shards.manifest.labels is not None
        assert found[key]["label"] == shards.manifest.labels[label]
        saved = np.load(tmp_path / "out" / found[key]["file"])
        np.testing.assert_allclose(saved["features"], values[None].numpy(), atol=1e-5)


def test_a_probe_of_several_clips_is_their_mean(
    tiny: Callable[..., PretrainRecipe], demo_shards: Path
) -> None:
    """12 frames hold three clips of 4 side by side."""
    recipe = tiny(data={"frames": 4}, probe={"clips": 3})
    encoder = untrained(recipe).encoder
    shards = ShardSet(demo_shards / "test")
    few, probed = freeze(encoder, recipe, shards, shards, videos=(3, 5)).features
    assert (len(few.values), len(probed.values)) == (3, 5)
    samples = shards.index(0).samples
    for number in range(5):
        film = decode("pyav", shards.read(0, samples[number]), np.arange(12))
        crop = view_crop(*film.shape[1:3], recipe.data.size)
        clips = [cut(film[at : at + 4], crop, recipe.data.size, flip=False) for at in (0, 4, 8)]
        with torch.no_grad():
            tokens = encode_clips(encoder, torch.stack(clips), recipe.patch)
        np.testing.assert_allclose(probed.values[number], tokens.mean((0, 1)), atol=1e-5)


def test_a_rerun_after_any_end_gives_the_same_files(extracted: Extract, tmp_path: Path) -> None:
    whole = extracted("whole", hop=2)
    assert (whole.videos, whole.new, whole.interrupted) == (6, 6, False)
    first = extracted("parts", hop=2, stop_after=3)
    assert (first.videos, first.new, first.interrupted) == (3, 3, True)
    # As a kill would leave it: a line cut short, its file not counted, another half written.
    index = tmp_path / "parts" / "index.jsonl"
    index.write_text(index.read_text()[:-10])
    (tmp_path / "parts" / "features" / "x.npz.partial").write_bytes(b"half")
    again = extracted("parts", hop=2)
    assert (again.videos, again.new, again.windows) == (6, 4, whole.windows)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert extracted("parts", hop=2).new == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_changed_video_and_a_missing_file_are_done_again(
    extracted: Extract, videos: Path, tmp_path: Path
) -> None:
    extracted()
    before = contents(tmp_path / "features_of")
    path = next(videos.rglob("*.mp4"))
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    next((tmp_path / "features_of" / "features").iterdir()).unlink()
    assert 1 <= extracted().new <= 2
    assert contents(tmp_path / "features_of").keys() == before.keys()


def test_broken_videos_are_rejects_and_tried_again(
    extracted: Extract, videos: Path, tmp_path: Path
) -> None:
    good = next(videos.rglob("*.mp4")).read_bytes()
    (videos / "cut.mp4").write_bytes(good[: len(good) // 2])
    (videos / "empty.mp4").touch()
    rejects = tmp_path / "features_of" / "rejects.jsonl"
    for _ in range(2):
        report = extracted()
        assert report.videos == 6
        assert report.rejects == {"cannot_open": 1, "empty": 1}
        assert [line["source_path"] for line in lines(rejects)] == ["cut.mp4", "empty.mp4"]
    (videos / "cut.mp4").write_bytes(good)
    assert extracted().rejects == {"empty": 1}


def test_no_usable_video(extracted: Extract, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the 1 videos is usable"):
        extracted(source=tmp_path / "bad.mp4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hop": 2}, "hop was 8, is 2"),
        ({"features": "time"}, "features was 'clip', is 'time'"),
        ({"format": "safetensors"}, "format was 'npz', is 'safetensors'"),
        ({"precision": "bf16"}, "precision was 'fp32', is 'bf16'"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], said: str, extracted: Extract, tmp_path: Path
) -> None:
    extracted()
    before = contents(tmp_path / "features_of")
    with pytest.raises(UserError, match=said):
        extracted(**change)
    assert contents(tmp_path / "features_of") == before


def test_other_weights_and_other_videos_are_refused(
    extracted: Extract, model: Path, videos: Path, recipe: Recipe
) -> None:
    extracted()
    with pytest.raises(UserError, match="input was"):
        extracted(source=next(videos.iterdir()))
    torch.manual_seed(5)
    state = {k: v + 1 for k, v in untrained(recipe).state_dict().items()}
    save_file(state, model / run_folder.MODEL)
    with pytest.raises(UserError, match="weights_sha256 was"):
        extracted()


def test_half_precision_is_close_and_kept_as_float32(extracted: Extract, tmp_path: Path) -> None:
    extracted("full", hop=4)
    extracted("half", hop=4, precision="bf16")
    for line in lines(tmp_path / "full" / "index.jsonl"):
        full, half = (
            np.load(tmp_path / name / line["file"])["features"] for name in ("full", "half")
        )
        assert half.dtype == np.float32
        assert 0 < np.abs(full - half).max() < 0.05


def test_a_hop_below_one(extracted: Extract) -> None:
    with pytest.raises(UserError, match="at least one frame"):
        extracted(hop=0)


@pytest.fixture
def command(model: Path, videos: Path, tmp_path: Path) -> list[str | Path]:
    return [
        ROOT / "scripts" / "extract_features.py", videos,
        "--model", model, "--output", tmp_path / "by_script", "--workers", "1", "--batch", "2",
    ]  # fmt: skip


def done(folder: Path) -> int:
    index = folder / "index.jsonl"
    return index.read_text().count("\n") if index.exists() else 0


@pytest.fixture
def started(command: list[str | Path], tmp_path: Path) -> Iterator[warm_start.Process]:
    """The command in the background, on videos enough to be interrupted; one is done."""
    for number in range(4):
        shutil.copytree(tmp_path / "videos", tmp_path / "more" / str(number))
    shutil.move(tmp_path / "more", tmp_path / "videos" / "more")
    process = warm_start.start(command, cwd=ROOT, env=command_environment())
    limit = time.monotonic() + 200
    while not done(tmp_path / "by_script") and time.monotonic() < limit:
        time.sleep(0.01)
    yield process
    process.kill_session()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_command_goes_on_after_a_signal(
    number: int,
    started: warm_start.Process,
    command: list[str | Path],
    extracted: Extract,
    tmp_path: Path,
) -> None:
    started.send_signal(number)
    out, _ = started.communicate(timeout=100)
    if number == signal.SIGINT:
        assert started.returncode == 75, out
        assert "the same command continues" in out
        assert len(lines(tmp_path / "by_script" / "index.jsonl")) == done(tmp_path / "by_script")
    assert 0 < done(tmp_path / "by_script") < 30
    finished = run_script(*command)
    assert finished.returncode == 0, finished.stderr
    assert "30 videos" in finished.stdout
    extracted("whole")
    assert contents(tmp_path / "by_script") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_exit_codes_of_the_command(command: list[str | Path], videos: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"no video")
    many = run_script(*command)
    assert many.returncode == 3, many.stderr
    assert "rejected: 1 (1 cannot_open)" in many.stdout
    assert run_script(*command, "--max_reject_share", "0.5").returncode == 0
    other = run_script(*command, "--hop", "2")
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert "hop was 8, is 2" in other.stderr


def looped(source: Path, path: Path, num_frames: int) -> Path:
    """The same clip again and again, its packets copied."""
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        rate = given.streams.video[0].average_rate
        assert rate is not None
        ticks = round(1 / (rate * given.streams.video[0].time_base))  # type: ignore[operator]
        written = 0
        while written < num_frames:
            given.seek(0)
            for packet in given.demux(video=0):
                if packet.dts is not None and written < num_frames:
                    packet.stream = stream
                    packet.dts = packet.pts = written * ticks
                    output.mux(packet)
                    written += 1
    return path


PEAK = "import resource, sys; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(
    model: Path, videos: Path, run: Run, tmp_path: Path
) -> None:
    """Five minutes at 30 frames a second, 44 MiB of pictures, against half a minute."""
    clip, script = next(videos.rglob("*.mp4")), ROOT / "scripts" / "extract_features.py"
    peaks = []
    for seconds in (32, 320):
        path = looped(clip, tmp_path / f"{seconds}.mp4", seconds * 30)
        arguments = [path, "--model", model, "--output", tmp_path / f"of_{seconds}"]
        arguments += ["--features", "token", "--workers", 0, "--batch", 32, "--hop", 16]
        code = f"import sys, runpy; sys.argv = {[str(script), *map(str, arguments)]!r}\n"
        code += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        done = run(sys.executable, "-c", f"{code}finally:\n    {PEAK}", timeout=900)
        assert done.returncode == 0, done.stderr
        assert f"{seconds * 30 // 16:,} windows" in done.stdout
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    print(f"peak MiB of 32 and 320 s: {peaks}")
    assert peaks[1] < peaks[0] + 32
