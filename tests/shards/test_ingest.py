"""Ingest decodes little, and what a video is rejected for does not depend on how it was read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from arvideo_ds.decoding import decoders
from arvideo_ds.decoding import video as video_module
from arvideo_ds.decoding.video import RejectedError, TranscodeSettings, decodable_frames, encode
from arvideo_ds.shards.ingest import ingest, ingest_bytes

FRAMES, GOP, SIDE = 60, 4, 32
SMALL = TranscodeSettings(short_side=SIDE, gop=GOP)
Decode = Callable[[bytes, np.ndarray], np.ndarray]


def brighter() -> bytes:
    """H.264 of 64 x 48 pixels; every frame is brighter than the one before."""
    pictures = (np.full((48, 64, 3), 20 + 3 * number, np.uint8) for number in range(FRAMES))
    frames = (av.VideoFrame.from_ndarray(p).reformat(format="yuv420p") for p in pictures)
    return encode(frames, rate=Fraction(10), settings=TranscodeSettings(gop=GOP, crf=10))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "x.mp4").write_bytes(brighter())
    return tmp_path / "x.mp4"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many frames of each height PyAV decoded in order."""
    heights: Counter[int] = Counter()

    def counted(*arguments: Any) -> Iterator[av.VideoFrame]:
        for frame in decodable_frames(*arguments):
            heights[frame.height] += 1
            yield frame

    for module in (video_module, decoders):
        monkeypatch.setattr(module, "decodable_frames", counted)
    return heights


def lie_about(monkeypatch: pytest.MonkeyPatch, lies: Callable[[np.ndarray], bool]) -> None:
    """PyAV shows black pictures for these numbers."""
    honest: Decode = decoders.DECODERS["pyav"]

    def lying(data: bytes, frames: np.ndarray) -> np.ndarray:
        return honest(data, frames) * (not lies(frames))

    monkeypatch.setitem(decoders.DECODERS, "pyav", lying)


def test_source_and_copy_are_each_decoded_once(path: Path, decoded: Counter[int]) -> None:
    """Beside that, single frames of the copy are decoded from the key frame before."""
    ingest(path, SMALL, decoders=["pyav"])
    assert decoded[48] == FRAMES
    assert FRAMES <= decoded[SIDE] <= FRAMES + 4 * GOP


def test_an_unchanged_video_is_decoded_once(path: Path, decoded: Counter[int]) -> None:
    ingest(path, None, decoders=["pyav"])
    assert FRAMES <= decoded[48] <= FRAMES + 4 * GOP


@pytest.mark.parametrize("settings", [SMALL, None])
@pytest.mark.parametrize("number", [FRAMES - 1, None])
def test_random_access_must_show_the_frames_of_a_decode_in_order(
    path: Path,
    settings: TranscodeSettings | None,
    number: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with one decoder alone has nothing else to compare with."""
    lie_about(monkeypatch, lambda n: n[0] > 0 and (number is None or n[0] == number))
    with pytest.raises(RejectedError) as caught:
        ingest(path, settings, decoders=["pyav"])
    assert caught.value.reason == "decoders_disagree"


def test_decoders_are_compared_as_they_read_several_frames_and_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Decode = decoders.DECODERS["pyav"]
    for lies in (lambda n: len(n) > 1, lambda n: 0 < n[0] < FRAMES - 1):
        other = lambda data, n, lies=lies: honest(data, n) * (not lies(n))  # noqa: E731
        monkeypatch.setitem(decoders.DECODERS, "torchcodec", other)
        monkeypatch.setitem(decoders._COUNTERS, "torchcodec", decoders._COUNTERS["pyav"])
        with pytest.raises(RejectedError) as caught:
            ingest(path, SMALL, decoders=["torchcodec", "pyav"])
        assert caught.value.message.startswith("pyav and torchcodec show other pictures")
    monkeypatch.setitem(decoders.DECODERS, "torchcodec", honest)
    assert ingest(path, SMALL, decoders=["torchcodec", "pyav"]).facts["num_frames"] == FRAMES


def test_a_lost_frame_is_counted_and_the_unchanged_video_is_kept(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    # The last of a group, to which no other refers.
    lost = packets[7 * GOP - 1]
    data[lost.pos : lost.pos + lost.size] = bytes(lost.size)
    facts = ingest_bytes(bytes(data), "mp4", ["pyav"]).facts
    assert (facts["num_frames"], facts["decoder_errors"]) == (FRAMES - 1, 1)


def test_what_is_wrong_with_a_source_comes_before_what_the_encoder_reports(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise RejectedError("no_frames", "the encoder failed")

    monkeypatch.setattr(video_module, "encode", broken)
    for part, reason in ((None, "no_frames"), ((50.0, 60.0), "past_end")):
        with pytest.raises(RejectedError) as caught:
            ingest(path, SMALL, part, decoders=["pyav"])
        assert caught.value.reason == reason
        assert part is None or "of a video of 6" in caught.value.message
