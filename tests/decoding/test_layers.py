"""Layered videos: the same frames under the same numbers, and fewer pictures to decode."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from arvideo_ds.data.sampling import train_frames
from arvideo_ds.decoding.decoders import decode, usable_decoders
from arvideo_ds.decoding.random_access import needed_packets
from arvideo_ds.decoding.video import (
    TranscodeSettings,
    decodable_frames,
    encode,
    open_video,
    transcode,
)

FRAMES = 75
LAYERED = TranscodeSettings(layers=4, gop=32)


def pictures(count: int = FRAMES, height: int = 48, width: int = 64) -> list[av.VideoFrame]:
    """Noise that moves, 4:2:0."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width + count, 3), dtype=np.uint8)
    return [
        av.VideoFrame.from_ndarray(noise[:, n : n + width]).reformat(format="yuv420p")
        for n in range(count)
    ]


def video(settings: TranscodeSettings, count: int = FRAMES) -> bytes:
    return encode(pictures(count), rate=Fraction(30), settings=settings)


def in_sequence(data: bytes) -> np.ndarray:
    """All frames, decoded one after the other, without skipping."""
    with open_video(io.BytesIO(data)) as container:
        frames = decodable_frames(container, container.streams.video[0])
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def x264(parameters: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options={"x264-params": parameters})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in pictures():
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def types(data: bytes) -> str:
    """Such as IBBBPBBBP: the type of each picture."""
    with open_video(io.BytesIO(data)) as container:
        frames = container.decode(video=0)
        return "".join(PictureType(frame.pict_type).name for frame in frames)


def test_the_layer_of_a_transcoded_video_does_not_depend_on_its_source() -> None:
    source = x264("bframes=1:b-adapt=0:keyint=7")
    layered, _ = transcode(io.BytesIO(source), LAYERED)
    assert types(layered) == types(video(LAYERED))
    assert "B" not in types(layered)[:: LAYERED.layers]


@pytest.mark.parametrize("decoder", usable_decoders())
def test_layered_and_plain_videos_have_the_same_pixels(decoder: str) -> None:
    """Lossless, so that nothing but the structure of the files differs."""
    everything = np.arange(FRAMES)
    plain = decode(decoder, video(TranscodeSettings(crf=0)), everything)
    layered = video(TranscodeSettings(crf=0, layers=4, gop=32))
    assert np.array_equal(decode(decoder, layered, everything), plain)
    for number in range(FRAMES):
        alone = decode(decoder, layered, np.array([number]))
        assert np.array_equal(alone[0], plain[number]), number
    for start in (0, 3, 12):
        clip = start + 4 * np.arange(16)
        assert np.array_equal(decode(decoder, layered, clip), plain[clip]), start


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: video(LAYERED), id="layered"),
        pytest.param(lambda: video(TranscodeSettings(layers=2, gop=16)), id="two"),
        pytest.param(lambda: video(TranscodeSettings()), id="plain"),
        pytest.param(lambda: x264("bframes=5:b-pyramid=normal:keyint=20"), id="pyramid"),
        pytest.param(lambda: x264("bframes=3:open-gop=1:keyint=16:b-adapt=0"), id="open groups"),
        pytest.param(lambda: x264("keyint=1"), id="intra"),
    ],
)
def test_skipping_changes_no_pixel(data: object) -> None:
    content = data()  # type: ignore[operator]
    whole, generator = in_sequence(content), np.random.default_rng(0)
    assert len(whole) == FRAMES
    for _ in range(30):
        numbers = generator.choice(FRAMES, size=generator.integers(1, 9), replace=False)
        frames = decode("pyav", content, numbers)
        assert np.array_equal(frames, whole[numbers]), numbers


def num_decoded(data: bytes, numbers: np.ndarray) -> int:
    with open_video(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return len(needed_packets(container, stream, set(numbers.tolist()))[1])


def test_a_clip_on_the_layer_decodes_half_the_pictures() -> None:
    layered, plain = video(LAYERED, 303), video(TranscodeSettings(), 303)
    starts = range(0, 303 - 61, 4)
    clips = [start + 4 * np.arange(16) for start in starts]
    on_layer = np.mean([num_decoded(layered, clip) for clip in clips])
    beside = np.mean([num_decoded(layered, clip + 1) for clip in clips])
    without = np.mean([num_decoded(plain, clip) for clip in clips])
    assert on_layer < 20 < beside < 40 < without


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 32, 33, 34])
def test_short_videos_keep_every_frame(count: int) -> None:
    data = video(LAYERED, count)
    assert data == video(LAYERED, count)
    everything = np.arange(count)
    for decoder in usable_decoders():
        assert len(decode(decoder, data, everything)) == count
    assert np.array_equal(decode("pyav", data, everything), in_sequence(data))


def starts(num_frames: int, stride: int, layers: int, sampling: str = "dense") -> list[int]:
    generator = np.random.default_rng(0)
    clips = [train_frames(num_frames, 16, stride, sampling, generator, layers) for _ in range(2000)]
    return [int(clip[0]) for clip in clips]


@pytest.mark.parametrize(("stride", "layers"), [(4, 4), (8, 4), (4, 2), (2, 2)])
def test_starts_are_uniform_on_the_layer(stride: int, layers: int) -> None:
    num_frames = 15 * stride + 43
    found, counts = np.unique(starts(num_frames, stride, layers), return_counts=True)
    assert np.array_equal(found, np.arange(0, 43, layers))
    mean = 2000 / len(found)
    assert np.all(np.abs(counts - mean) < 6 * mean**0.5)


def test_other_strides_start_anywhere() -> None:
    assert set(starts(100, 3, 4)) == set(range(100 - 45))
    # Too short for the stride: the largest that fits.
    assert starts(50, 4, 4) == starts(50, 3, 1)
    assert starts(100, 4, 4, "uniform") == starts(100, 4, 1, "uniform")
