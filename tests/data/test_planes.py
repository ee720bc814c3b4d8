"""Clips as planes: the device's conversion is FFmpeg's, and crops are those of RGB clips."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import collate
from arvideo_ds.data.planes import cut_planes, to_rgb
from arvideo_ds.data.transforms import Crop, cut
from arvideo_ds.decoding.decoders import decode, decode_planes
from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import ShardSet

MakeRecipe = Callable[..., PretrainRecipe]

FRAMES = np.arange(8)


@pytest.fixture(scope="module")
def shards(demo_shards: Path) -> ShardSet:
    return ShardSet(demo_shards / "train")


@pytest.fixture(scope="module")
def colourful() -> bytes:
    """Smooth colours with sharp edges, 76 x 100 pixels."""
    rows, columns = np.mgrid[:76, :100]
    frames = []
    for n in range(8):
        red = 2 * columns + 8 * n
        green = 3 * rows
        blue = 255 * ((columns + rows + 4 * n) // 20 % 2)
        picture = np.stack(np.broadcast_arrays(red, green, blue), axis=-1).clip(0, 255)
        frames.append(av.VideoFrame.from_ndarray(picture.astype(np.uint8)))
    yuv = [frame.reformat(format="yuv420p") for frame in frames]
    return encode(yuv, rate=Fraction(8), settings=TranscodeSettings(crf=8))


def test_the_conversion_is_ffmpegs_within_one_level(colourful: bytes) -> None:
    rgb = decode("pyav", colourful, FRAMES).astype(int)
    planes = torch.from_numpy(decode_planes(colourful, FRAMES))
    converted = to_rgb(planes[None])[0].numpy().astype(int)
    assert np.abs(converted - rgb).max() <= 1
    assert np.abs(converted - rgb).mean() < 0.5


def test_every_colour_is_converted_within_one_level() -> None:
    """All values of luma with a spread of colour differences, in and beyond the legal range."""
    luma = np.arange(256, dtype=np.uint8).repeat(2)[None].repeat(2, axis=0)
    for u, v in np.random.default_rng(0).integers(0, 256, (300, 2)):
        half = np.full((1, 256), u, np.uint8), np.full((1, 256), v, np.uint8)
        stacked = np.concatenate([luma.ravel(), *(part.ravel() for part in half)])
        frame = av.VideoFrame.from_ndarray(stacked.reshape(3, 512), format="yuv420p")
        rgb = frame.to_ndarray(format="rgb24").astype(int)
        packed = np.concatenate([luma, np.concatenate(half, axis=1)])
        ours = to_rgb(torch.from_numpy(packed)[None, None])[0, 0].numpy().astype(int)
        assert np.abs(ours - rgb).max() <= 1, (u, v)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [Crop(0, 0, 76, 100), Crop(7, 11, 61, 63), Crop(20, 40, 24, 24)])
def test_crops_are_those_of_rgb_but_for_rounding(colourful: bytes, crop: Crop, flip: bool) -> None:
    size = (48, 64)
    rgb = cut(decode("pyav", colourful, FRAMES), crop, size, flip=flip).float()
    planes = cut_planes(decode_planes(colourful, FRAMES), crop, size, flip=flip)
    assert planes.shape == (8, 72, 64)
    converted = to_rgb(planes[None])[0].float()
    apart = (converted - rgb).abs().mean()
    # A picture shifted by two pixels would differ far more.
    assert apart < 0.5 * (rgb.roll(2, dims=2) - rgb).abs().mean()
    assert (converted.mean((0, 1, 2)) - rgb.mean((0, 1, 2))).abs().max() < 2


def test_the_loader_s_clips_are_converted_on_their_way_to_the_device(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    """The same frames, crops and flips as in RGB."""
    data = {"decoder": "pyav", "flip": True, "repeats": 2, "crop": "multi_scale"}
    videos = [
        [TrainClips(shards, tiny(data={**data, "planes": planes}))[n] for n in range(4)]
        for planes in (False, True)
    ]
    rgb, planes = (collate(each) for each in videos)
    assert TrainClips(shards, tiny(data={"planes": True})).decoder == "pyav"
    assert planes.clips.shape == (8, 8, 48, 32) and planes.clips.nbytes * 2 == rgb.clips.nbytes
    moved = planes.to(torch.device("cpu"))
    assert moved.clips.shape == rgb.clips.shape
    assert torch.equal(moved.keys, rgb.keys)
    apart = (moved.clips.float() - rgb.clips.float()).abs().flatten(1).mean(1)
    others = (rgb.clips.float() - rgb.clips.roll(2, 0).float()).abs().flatten(1).mean(1)
    assert (apart < 0.5 * others).all()


def test_a_video_that_does_not_decode_is_black(
    shards: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardSet, "read", lambda *_: b"no video")
    video = TrainClips(shards, tiny(data={"planes": True}))[0]
    assert video.skipped is not None
    assert not collate([video]).to(torch.device("cpu")).clips.any()


@pytest.mark.parametrize(
    "setting", [{"erase": 0.25}, {"decoder": "decord"}, {"size": (31, 32)}, {"crop": "grid"}]
)
def test_what_needs_rgb_is_refused(tiny: MakeRecipe, setting: dict[str, object]) -> None:
    (key,) = setting
    with pytest.raises(UserError, match=f"data.planes=true does not go with data.{key}="):
        tiny(data={"planes": True, **setting})
