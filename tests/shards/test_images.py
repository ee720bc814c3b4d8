"""Images as videos of one frame: each file is a sample with its colours, or a counted reject."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import EvaluationClips, TrainClips
from arvideo_ds.decoding.decoders import decisive_decoders, decode
from arvideo_ds.decoding.video import RejectedError, TranscodeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.ingest import Sample, ingest
from arvideo_ds.shards.manifest import REJECTS, ShardSet
from arvideo_ds.shards.writer import ShardJob, write_shards

KEPT = TranscodeSettings(short_side=0, crf=5)
HEIGHT, WIDTH = 48, 64
ORIENTATION = 0x112


def picture() -> Image.Image:
    """Different in every corner, so that each turn and each mirroring shows."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    colours = [255 * columns / WIDTH, 255 * rows / HEIGHT, 128 + 0 * rows]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))


def frame(sample: Sample, decoder: str = "pyav") -> np.ndarray:
    assert sample.facts["num_frames"] == 1
    return decode(decoder, sample.video, np.array([0]))[0]


def assert_shows(sample: Sample, expected: Image.Image) -> None:
    for decoder in decisive_decoders():
        found = frame(sample, decoder).astype(int)
        assert found.shape == (*expected.size[::-1], 3)
        assert np.abs(found - np.asarray(expected.convert("RGB"))).mean() < 4


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp"])
def test_every_format_keeps_its_colours(suffix: str, tmp_path: Path) -> None:
    """JPEG has the full range of luma, H.264 the limited one."""
    picture().save(tmp_path / f"x.{suffix}")
    assert_shows(ingest(tmp_path / f"x.{suffix}", KEPT), picture())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_kind_of_pixel_becomes_colour(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image = picture().quantize(64, dither=0) if mode == "P" else picture().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(7)  # nearly transparent
    image.save(path)
    expected = image.convert("RGB")
    assert_shows(ingest(path, KEPT), expected)


def test_16_bits_are_reduced_to_8(tmp_path: Path) -> None:
    grey = np.asarray(picture().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x.png")
    assert_shows(ingest(tmp_path / "x.png", KEPT), Image.fromarray(grey))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture().save(tmp_path / f"x.{suffix}", exif=exif)
    upright = picture().transpose(turns[orientation]) if orientation in turns else picture()
    assert_shows(ingest(tmp_path / f"x.{suffix}", KEPT), upright)


@pytest.mark.parametrize("name", ["x.webp", "x.png"])
def test_the_first_picture_of_an_animation_is_taken(name: str, tmp_path: Path) -> None:
    others = [picture().rotate(90), picture().rotate(180)]
    picture().save(tmp_path / name, save_all=True, append_images=others, duration=100)
    assert_shows(ingest(tmp_path / name, KEPT), picture())


def test_the_pixel_aspect_is_ignored_and_sides_become_even(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.jpg", dpi=(72, 144))
    assert frame(ingest(tmp_path / "x.jpg", KEPT)).shape == (HEIGHT, WIDTH, 3)
    picture().resize((33, 17)).save(tmp_path / "x.png")
    assert frame(ingest(tmp_path / "x.png", KEPT)).shape == (16, 32, 3)
    small = ingest(tmp_path / "x.jpg", TranscodeSettings(short_side=24))
    assert frame(small).shape == (24, 32, 3)


def reason(path: Path, max_pixels: int = 10**6) -> str:
    with pytest.raises(RejectedError) as raised:
        ingest(path, KEPT, max_pixels=max_pixels)
    assert raised.value.message
    return raised.value.reason


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_images_that_end_early_are_rejected_wherever_they_end(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    picture().save(path, **({"progressive": True} if suffix == "jpg" else {}))
    data = path.read_bytes()
    for share in np.linspace(0, 0.95, 12):
        path.write_bytes(data[: int(share * len(data))])
        assert reason(path) in ("empty", "cannot_open", "truncated", "damaged"), share


def test_other_files_and_huge_images_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    picture().save(tmp_path / "moving.jpg", format="GIF")
    for name in ("page.jpg", "moving.jpg"):
        assert reason(tmp_path / name) == "cannot_open"
    picture().save(tmp_path / "named.jpg", format="PNG")
    assert_shows(ingest(tmp_path / "named.jpg", KEPT), picture())
    assert reason(tmp_path / "named.jpg", max_pixels=HEIGHT * WIDTH - 1) == "too_large"
    for side in (9000, 46000):  # by the header, which Pillow accepts or not
        data = (tmp_path / "named.jpg").read_bytes()
        header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        checksum = struct.pack(">I", zlib.crc32(header))
        (tmp_path / "bomb.png").write_bytes(data[:12] + header + checksum + data[33:])
        assert reason(tmp_path / "bomb.png") == "too_large"


def test_a_damaged_png_is_rejected_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    picture().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert reason(path) == "damaged"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout: ten good images in two classes, three bad ones, and other files."""
    folder = tmp_path_factory.mktemp("tree")
    for number in range(10):
        path = folder / "train" / f"n0{number % 2}" / f"{number}.{['JPEG', 'png'][number // 5]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().resize((640, 480)).rotate(10 * number).save(path)
    whole = (folder / "train" / "n00" / "0.JPEG").read_bytes()
    (folder / "train" / "n00" / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "n01" / "page.png").write_text("<html>")
    (folder / "train" / "n01" / "none.jpg").write_bytes(b"")
    (folder / "train" / "n01" / "film.mp4").write_bytes(b"x")
    return folder


def job_of(tree: Path, output: Path, transcode: TranscodeSettings | None) -> ShardJob:
    listing = read_listing("images", Source(tree, split="train"))
    return ShardJob("images", "train", listing, output, transcode, 4, 0, 1, 60.0)


def test_every_file_is_a_sample_a_reject_or_passed_over(
    tree: Path, tmp_path: Path, tiny: Callable[..., PretrainRecipe]
) -> None:
    job = job_of(tree, tmp_path, TranscodeSettings(short_side=32))
    report = write_shards(job)
    assert report.manifest.labels == ("n00", "n01")
    assert report.manifest.num_samples == 10
    rejects = [json.loads(line) for line in (tmp_path / REJECTS).read_text().splitlines()]
    assert {reject["source_path"]: reject["reason"] for reject in rejects} == {
        "train/n00/cut.JPEG": "truncated",
        "train/n01/page.png": "cannot_open",
        "train/n01/none.jpg": "empty",
    }
    assert job.listing.passed_over == {".mp4": 1}
    shards = ShardSet(tmp_path)
    assert all(s.suffix == "mp4" and s.num_frames == 1 for s in shards.index(0).samples)
    recipe = tiny(data={"num_streams": 1, "stride": 4})
    for clips in (TrainClips(shards, recipe), EvaluationClips(shards, recipe)):
        (clip,) = clips[0].clips
        assert clip.shape == (8, 32, 32, 3)
        assert torch.equal(clip, clip[:1].expand_as(clip))  # the frame, repeated
        assert clip.float().std() > 10


def test_copies_annotations_and_folders_without_images_are_refused(
    tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="need --video transcode"):
        write_shards(job_of(tree, tmp_path, None))
    with pytest.raises(UserError, match="labels from the folders"):
        read_listing("images", Source(tree, annotations=tree / "list.csv"))
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no files for .*\.mp4 1.* suffix: \.bmp \.jpeg"):
        read_listing("images", Source(tmp_path))
