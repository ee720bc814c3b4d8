"""Windows: which frames they take and stand for, at any length; and that memory is bounded."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.data.windows import Windows, WindowShape, read_windows, slide
from arvideo_ds.decoding.decoders import decode
from arvideo_ds.decoding.video import RejectedError, TranscodeSettings, encode, transcode


def shape_of(frames: int, stride: int, hop: int | None = None) -> WindowShape:
    return WindowShape(frames, stride, hop or frames * stride, (16, 16), "dense")


shapes = st.builds(shape_of, st.integers(1, 8), st.integers(1, 5), st.integers(1, 60))


@settings(deadline=None, max_examples=300)
@given(shape=shapes, num_frames=st.integers(1, 200))
def test_windows_take_real_frames_and_reach_the_end(shape: WindowShape, num_frames: int) -> None:
    windows = list(slide(range(num_frames), shape, lambda number: number))
    assert windows
    if num_frames <= shape.reach:
        (only,) = windows
        assert (only.start, only.stop) == (0, num_frames)
        expected = view_frames(num_frames, shape.frames, shape.stride, shape.sampling)
        assert only.frames == expected.tolist()
        return
    for window in windows:
        assert window.frames == list(range(window.start, window.stop, shape.stride))
        assert len(window.frames) == shape.frames
        assert window.frames[-1] < num_frames
    starts = [window.start for window in windows]
    regular = list(range(0, num_frames - shape.reach, shape.hop))
    assert starts[: len(regular)] == regular
    assert len(starts) <= len(regular) + 1  # and the last, moved to the end
    assert len(set(starts)) == len(starts)
    if shape.hop <= shape.span:
        covered = {n for w in windows for n in range(w.start, min(w.stop, num_frames))}
        assert covered == set(range(num_frames))


@pytest.mark.parametrize("hop", [None, 1, 6, 40])
def test_frames_are_kept_no_longer_than_a_window_reaches(hop: int | None) -> None:
    shape = shape_of(4, 4, hop)
    alive: set[int] = set()
    most = 0

    class Tracked:
        def __init__(self, number: int) -> None:
            self.number = number
            alive.add(number)

        def __del__(self) -> None:
            alive.discard(self.number)

    for _ in slide(range(5000), shape, Tracked):
        most = max(most, len(alive))
    assert most <= 2 * shape.span


def test_only_frames_that_a_window_may_take_are_prepared() -> None:
    shape, prepared = shape_of(8, 4), []
    list(slide(range(1000), shape, prepared.append))
    assert len(prepared) < 1000 / shape.stride + shape.span


def video(num_frames: int, *, width: int = 64, height: int = 48) -> bytes:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (num_frames, 6, 8, 3), dtype=np.uint8)
    frames = (
        av.VideoFrame.from_ndarray(picture).reformat(width, height, "yuv420p")
        for picture in pictures
    )
    return encode(frames, rate=Fraction(10), settings=TranscodeSettings())


@pytest.mark.parametrize("num_frames", [1, 5, 13, 14, 40])
@pytest.mark.parametrize("hop", [None, 3])
def test_clips_are_those_of_the_plain_decoder(num_frames: int, hop: int | None) -> None:
    data, shape = video(num_frames), shape_of(4, 4, hop)
    *batches, found = read_windows(io.BytesIO(data), None, shape, batch=2)
    assert isinstance(found, Windows)
    assert all(len(batch) <= 2 for batch in batches)
    clips = np.concatenate(batches)
    expected = slide(range(num_frames), shape, lambda number: number)
    for clip, window in zip(clips, expected, strict=True):
        frames = decode("pyav", data, np.array(window.frames))
        crop = view_crop(48, 64, shape.size)
        np.testing.assert_array_equal(clip, cut(frames, crop, shape.size, flip=False).numpy())
    assert found.num_frames == num_frames
    assert found.stop_frame.max() == num_frames
    np.testing.assert_allclose(found.start_s, found.start_frame / 10, atol=1e-4)
    np.testing.assert_allclose(found.stop_s, found.stop_frame / 10, atol=1e-4)


def test_a_part_is_a_video_of_its_own() -> None:
    shape = shape_of(2, 1)
    *batches, found = read_windows(io.BytesIO(video(40)), (1.0, 2.0), shape, batch=99)
    assert isinstance(found, Windows)
    assert found.num_frames == 10
    assert found.start_s[0] == 0
    whole, *_ = read_windows(io.BytesIO(video(40)), None, shape, batch=99)
    np.testing.assert_array_equal(np.concatenate(batches), whole[5:10])


def test_seconds_follow_the_time_stamps(tmp_path: Path) -> None:
    path = tmp_path / "varying.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"g": "1", "bf": "0"})
        stream.width = stream.height = 32
        for time_ms in (0, 100, 1100, 1200):
            frame = av.VideoFrame(32, 32, "yuv420p")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with path.open("rb") as file:
        *_, found = read_windows(file, None, shape_of(1, 1), batch=9)
    assert isinstance(found, Windows)
    np.testing.assert_allclose(found.start_s, [0, 0.1, 1.1, 1.2], atol=0.002)


@pytest.mark.parametrize("name", ["rotated_270_metadata.mp4", "sar_16_11.mp4"])
def test_frames_come_as_they_are_to_be_shown(name: str, real_videos: Path) -> None:
    data = (real_videos / "odd" / name).read_bytes()
    upright, _ = transcode(io.BytesIO(data), TranscodeSettings(short_side=0, crf=5))
    first, second = (
        next(read_windows(io.BytesIO(video), None, shape_of(4, 1), batch=1))
        for video in (data, upright)
    )
    assert isinstance(first, np.ndarray)
    assert isinstance(second, np.ndarray)
    assert np.abs(first.astype(int) - second.astype(int)).mean() < 3
    assert np.abs(first.astype(int) - second[:, :, ::-1].astype(int)).mean() > 10


def test_nothing_that_decodes_and_too_little_of_it_are_rejected() -> None:
    shape = shape_of(2, 1)
    with pytest.raises(RejectedError, match="cannot_open"):
        list(read_windows(io.BytesIO(b"no video"), None, shape, batch=1))
    with pytest.raises(RejectedError, match="past_end"):
        list(read_windows(io.BytesIO(video(5)), (7.0, 8.0), shape, batch=1))


def test_decoding_processes_import_neither_timm_nor_models() -> None:
    """They would start 1.5 s of CPU time later, each."""
    code = "import sys, arvideo_ds.data.windows, arvideo_ds.long_video.scoring_pass\n"
    code += "heavy = {'timm', 'deepspeed', 'arvideo_ds.models.encoder'}\n"
    code += "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
