"""inspect_shards.py: the table is what the shards hold, the pictures show it."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from arvideo_ds.decoding.decoders import decode
from arvideo_ds.decoding.video import TranscodeSettings, encode, probe
from arvideo_ds.shards.inspection import (
    Inspection,
    Thumbnail,
    format_rows,
    inspect_shards,
    middle_frame,
    table,
    thumbnails,
)
from arvideo_ds.shards.inspection_pictures import draw_contact_sheet, draw_histograms
from arvideo_ds.shards.manifest import MANIFEST, REJECTS, IndexedSample, Reject, ShardSet
from tests.conftest import ROOT, run_command

SCRIPT = ROOT / "data_tools" / "inspect_shards.py"


@pytest.fixture
def folder(demo_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(demo_shards / "train", tmp_path / "shards")


# Between dollars, but no formula: drawing it as one would fail.
NO_MATHS = r"$\frac$"


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = run_command(sys.executable, SCRIPT, *arguments)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def random_inspection(num_samples: int, num_labels: int) -> Inspection:
    """Made-up facts of many videos."""
    generator = np.random.default_rng(num_samples)
    num_frames = generator.integers(30, 400, num_samples)
    fps = generator.uniform(5, 60, num_samples)
    counts = generator.multinomial(num_samples, np.full(max(1, num_labels), 1 / max(1, num_labels)))
    return Inspection(
        dataset="made_up",
        split="train",
        num_shards=3,
        shard_bytes=5 * 2**30,
        num_frames=num_frames,
        duration_s=num_frames / fps,
        fps=fps,
        width=generator.integers(100, 900, num_samples),
        height=generator.integers(100, 900, num_samples),
        codecs={"h264": num_samples},
        label_counts={f"class {NO_MATHS} {n}": int(counts[n]) for n in range(num_labels)},
        num_unlabelled=0 if num_labels else num_samples,
        rejects={"truncated": 3, "empty": 1},
    )


def test_the_facts_are_those_of_the_videos(demo_shards: Path) -> None:
    found = inspect_shards(demo_shards / "train")
    files = sorted((demo_shards / "videos" / "train").rglob("*.mp4"))
    infos = [probe(io.BytesIO(path.read_bytes())) for path in files]
    assert found.num_samples == len(infos) == 48
    assert sorted(found.num_frames) == sorted(info.num_frames for info in infos)
    assert sorted(found.duration_s) == sorted(info.duration_s for info in infos)
    assert sorted(found.width) == sorted(info.width for info in infos)
    assert found.label_counts == {
        path.name: len(list(path.iterdir()))
        for path in sorted((demo_shards / "videos" / "train").iterdir())
    }
    assert found.shard_bytes == sum(p.stat().st_size for p in (demo_shards / "train").glob("*.tar"))
    assert (found.codecs, found.num_unlabelled, found.rejects) == ({"h264": 48}, 0, {})


def test_rejects_are_counted_by_reason(folder: Path) -> None:
    reasons = ("empty", "truncated", "empty")
    rejects = [Reject(source_path="a.mp4", reason=reason, message="") for reason in reasons]
    (folder / REJECTS).write_text("".join(r.model_dump_json() + "\n" for r in rejects))
    rows = dict(table(inspect_shards(folder), clip_frames=8))
    assert rows["rejected"] == "3: empty 2, truncated 1"


def test_the_table_counts_everything_and_shows_both_ends_of_the_labels() -> None:
    found = random_inspection(2000, 40)
    text = format_rows(table(found, clip_frames=8))
    assert f"{found.num_frames.sum():,} frames" in text
    assert f"{found.duration_s.sum() / 3600:,.2f} h" in text
    by_count = sorted(found.label_counts, key=lambda name: found.label_counts[name])
    shown = [line.split(maxsplit=1)[1] for line in text.splitlines() if "  class " in line]
    assert len(shown) == 10
    most, fewest = by_count[-1], by_count[0]
    assert found.label_counts[shown[0]] == found.label_counts[most]
    assert found.label_counts[shown[-1]] == found.label_counts[fewest]
    assert "4: truncated 3, empty 1" in text
    assert dict(table(random_inspection(20, 0), clip_frames=8))["labels"] == "none"


def test_videos_shorter_than_a_clip_are_counted_where_there_are_any() -> None:
    found = replace(random_inspection(4, 0), num_frames=np.array([15, 16, 3, 300]))
    rows = dict(table(found, clip_frames=16))
    assert rows["short"] == "2 have fewer than 16 frames: their last is repeated"
    assert "short" not in dict(table(found, clip_frames=3))


def test_few_labels_are_all_shown_also_those_without_samples() -> None:
    found = replace(random_inspection(9, 3), label_counts={"a": 9, "b": 0, "c": 0})
    text = format_rows(table(found, clip_frames=8))
    assert all(f"  {name}" in text for name in "abc")


def test_thumbnails_are_middle_frames_chosen_by_the_seed(demo_shards: Path) -> None:
    folder = demo_shards / "train"
    shards = ShardSet(folder)
    samples = {sample.key: sample for sample in shards.index(0).samples}
    labels = shards.manifest.labels
    found = thumbnails(folder, 5, seed=3, workers=1)
    assert len({thumbnail.key for thumbnail in found}) == 5
    for thumbnail in found:
        sample = samples[thumbnail.key]
        middle = np.array([sample.num_frames // 2])
        expected = decode("pyav", shards.read(0, sample), middle)[0]
        assert np.array_equal(thumbnail.frame, expected)
        assert labels is not None
        assert sample.label is not None
        assert thumbnail.label == labels[sample.label]
    again, other = (thumbnails(folder, 5, seed=seed, workers=2) for seed in (3, 4))
    assert [t.key for t in again] == [t.key for t in found]
    assert [t.key for t in other] != [t.key for t in found]
    assert len(thumbnails(folder, 1000, seed=0, workers=1)) == 48


def test_large_frames_are_made_smaller_in_proportion(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1280)[None, :, None].repeat(720, 0).repeat(3, 2).astype(np.uint8)
    frames = [av.VideoFrame.from_ndarray(ramp).reformat(format="yuv420p") for _ in range(9)]
    data = encode(frames, rate=Fraction(9), settings=TranscodeSettings())
    (tmp_path / "tar").write_bytes(b"x" * 100 + data)
    place = IndexedSample(
        key="k", suffix="mp4", offset=100, bytes=len(data), crc32=0, num_frames=9, label=None
    )
    frame = middle_frame(tmp_path / "tar", place)
    whole = decode("pyav", data, np.array([4]))[0]
    assert max(frame.shape) == 480 < max(whole.shape)
    assert frame.shape[1] / frame.shape[0] == pytest.approx(whole.shape[1] / whole.shape[0], 0.01)
    assert np.abs(frame.mean((0, 1)) - whole.mean((0, 1))).max() < 2


def test_a_video_that_does_not_decode_leaves_the_others_to_be_seen(folder: Path) -> None:
    shards = ShardSet(folder)
    bad = shards.index(0).samples[7]
    with (folder / shards.manifest.shards[0].name).open("r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.bytes))
    found = {thumbnail.key: thumbnail for thumbnail in thumbnails(folder, 48, seed=0, workers=1)}
    assert [key for key, thumbnail in found.items() if thumbnail.frame is None] == [bad.key]
    assert found[bad.key].problem
    texts = texts_of(draw_contact_sheet(list(found.values()), inspect_shards(folder)))
    assert "does not decode" in texts


def texts_of(figure: Figure) -> str:
    """All texts of a figure after drawing it."""
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_contact_sheet_has_every_frame_with_label_and_key() -> None:
    frames = [np.full((30 + 10 * n, 40, 3), n, np.uint8) for n in range(8)]
    shown = [
        Thumbnail(f"key_{n}", f"label {NO_MATHS} {n}", frame) for n, frame in enumerate(frames)
    ]
    figure = draw_contact_sheet(shown, random_inspection(100, 8))
    texts = texts_of(figure)
    assert all(f"key_{n}" in texts and f"label {NO_MATHS} {n}" in texts for n in range(8))
    assert "8 of 100 videos" in texts
    for axis, frame in zip(figure.axes, frames, strict=True):
        (image,) = axis.images
        assert np.array_equal(np.asarray(image.get_array()), frame)
        left, right, bottom, top = image.get_extent()
        # Nothing is stretched and nothing cut off.
        box = axis.get_window_extent()
        (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
        assert (x1 - x0) / (y1 - y0) == pytest.approx(box.width / box.height)
        assert (right - left) / (top - bottom) == pytest.approx(frame.shape[1] / frame.shape[0])
        assert x0 <= left < right <= x1
        assert y0 <= bottom < top <= y1


def test_a_long_label_and_key_are_shortened_to_their_box() -> None:
    long = Thumbnail("k" * 200, "word " * 60, np.zeros((30, 40, 3), np.uint8))
    figure = draw_contact_sheet([long] * 3, random_inspection(100, 8))
    figure.canvas.draw()
    box = figure.axes[1].get_window_extent()
    for text in figure.axes[1].texts:
        assert text.get_window_extent().width < 1.06 * box.width


@pytest.mark.parametrize("num_labels", [0, 3, 400])
def test_every_video_is_in_every_histogram(num_labels: int) -> None:
    found = random_inspection(700, num_labels)
    figure = draw_histograms(found)
    figure.canvas.draw()
    *distributions, classes = figure.axes
    assert [axis.get_xlabel() for axis in distributions] == [
        "frames",
        "seconds",
        "short side, pixels",
        "frames per second",
    ]
    for axis in distributions:
        bars = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        assert sum(bar.get_height() for bar in bars) == 700
    if num_labels == 3:
        assert sum(bar.get_width() for bar in classes.patches) == 700
        assert f"class {NO_MATHS} 2" in texts_of(figure)
    elif num_labels:
        assert "400 classes" in texts_of(figure)
    else:
        assert "no labels" in texts_of(figure)


def test_a_single_value_and_a_single_video_are_drawn() -> None:
    found = replace(random_inspection(1, 1), fps=np.array([25.0]))
    texts = texts_of(draw_histograms(found))
    assert "25" in texts


def test_the_command_prints_the_table_and_writes_pictures_where_told(
    demo_shards: Path, tmp_path: Path
) -> None:
    shards = demo_shards / "train"
    before = set(shards.iterdir())
    done = command(shards, "--output", tmp_path / "out" / "here", "--num_videos", "7")
    assert done.returncode == 0, done.stderr
    assert "samples     48" in done.stdout
    for name in ("histograms.png", "videos.png"):
        assert str(tmp_path / "out" / "here" / name) in done.stdout
        picture = imread(tmp_path / "out" / "here" / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05
    assert set(shards.iterdir()) == before


def test_without_output_no_picture_is_written(demo_shards: Path) -> None:
    done = command(demo_shards / "train")
    assert done.returncode == 0, done.stderr
    assert "png" not in done.stdout


def test_damaged_shards_end_with_2_and_are_named(folder: Path) -> None:
    shards = ShardSet(folder)
    sample, path = shards.index(0).samples[3], folder / shards.manifest.shards[0].name
    with path.open("r+b") as file:
        file.seek(sample.offset - 1024)
        file.write(b"not json")
    done = command(folder)
    assert done.returncode == 2
    assert sample.key in done.stderr
    assert "arvideo verify" in done.stderr
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 512)
    assert f"{path.stat().st_size} bytes" in command(folder).stderr
    (folder / MANIFEST).unlink()
    assert command(folder).returncode == 2
