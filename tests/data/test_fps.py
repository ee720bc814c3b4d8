"""data.fps: clips of videos of any frame rate span the same time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.config import DetectRecipe, PretrainRecipe
from arvideo_ds.data import clips as clips_module
from arvideo_ds.data.clips import EvaluationClips, TrainClips, VideoClips
from arvideo_ds.data.detection import TrainKeyframes
from arvideo_ds.data.sampling import dense_frames, keyframe_frames, view_frames
from arvideo_ds.data.windows import Windows, WindowShape, read_windows, slide
from arvideo_ds.decoding.decoders import usable_decoders
from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.evaluation.predictions import central_clip
from arvideo_ds.shards.ingest import Sample
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.members import read_facts
from arvideo_ds.shards.writer import write_manifest, write_shard
from tests.ava_set import AvaSet

MakeRecipe = Callable[..., PretrainRecipe]
RATES = {"24": Fraction(24), "25": Fraction(25), "29.97": Fraction(30000, 1001), "30": Fraction(30),
         "60": Fraction(60)}  # fmt: skip
FPS, SECONDS, GREY_PER_S = 5.0, 4, 50
STARTS = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


def brightening(rate: Fraction) -> bytes:
    """A video whose pictures show their time: every second `GREY_PER_S` levels brighter."""
    levels = (20 + GREY_PER_S * n / float(rate) for n in range(int(SECONDS * rate)))
    pictures = (np.full((48, 64, 3), round(level), np.uint8) for level in levels)
    frames = (av.VideoFrame.from_ndarray(p).reformat(format="yuv420p") for p in pictures)
    return encode(frames, rate=rate, settings=TranscodeSettings(crf=1))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """One video of each rate. The facts and the index do not contain the rates."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = [
        (name.replace(".", "_"), Sample(brightening(rate), "mp4", facts(int(SECONDS * rate))))
        for name, rate in RATES.items()
    ]
    index = write_shard(folder, "mixed-000000.tar", samples, "inputs")
    named: dict[str, Any] = {"dataset": "mixed", "split": None, "labels": None, "settings": {}}
    write_manifest(folder, {"mixed-000000.tar": index}, [], **named)
    return ShardSet(folder)


def facts(num_frames: int) -> dict[str, Any]:
    return {"num_frames": num_frames, "label": None}


def seconds(clip: torch.Tensor) -> np.ndarray:
    """Times of a clip of `brightening`, from its first frame."""
    grey = clip.float().mean(dim=(1, 2, 3)).numpy()
    return np.asarray((grey - grey[0]) / GREY_PER_S)


@given(
    st.sampled_from(list(RATES.values())),
    st.floats(0.5, 70),
    st.integers(1, 32),
    st.integers(0, 300),
    STARTS,
)
def test_every_frame_is_the_nearest_to_its_time(
    rate: Fraction, fps: float, frames: int, spare: int, start: float
) -> None:
    stride = float(rate) / fps
    num_frames = int(stride * (frames - 1) + 2) + spare
    for found in (
        dense_frames(num_frames, frames, stride, start),
        view_frames(num_frames, frames, stride, "dense", 1, 3),
    ):
        assert found.dtype == np.int64
        assert 0 <= found[0] <= found[-1] < num_frames
        times = found / float(rate)
        expected = times[0] + np.arange(frames) / fps
        assert np.abs(times - expected).max() <= 0.5 / float(rate) + 1e-9
    first = dense_frames(num_frames, frames, stride, 0.0)
    last = dense_frames(num_frames, frames, stride, 1.0)
    assert (first[0], last[-1]) == (0, num_frames - 1)


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 9), STARTS, st.integers(0, 199))
def test_a_whole_ratio_gives_the_frames_of_that_stride(
    num_frames: int, frames: int, stride: int, start: float, keyframe: int
) -> None:
    """Also of videos shorter than the clip: 30 frames per second at fps 7.5 are stride 4."""
    ratio = 30 / (30 / stride)
    arguments = num_frames, frames
    found = dense_frames(*arguments, ratio, start)
    assert found.tolist() == dense_frames(*arguments, stride, start).tolist()
    keyframe = min(keyframe, num_frames - 1)
    around = keyframe_frames(*arguments, ratio, keyframe)
    assert around.tolist() == keyframe_frames(*arguments, stride, keyframe).tolist()
    assert around[frames // 2] == keyframe


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 9), STARTS, st.integers(1, 4))
def test_layers_serve_videos_whose_rate_is_about_a_whole_ratio(
    num_frames: int, frames: int, stride: int, start: float, layers: int
) -> None:
    """29.97 frames per second at fps 7.5 take the frames of stride 4, from a start on the layer."""
    found = dense_frames(num_frames, frames, stride * 0.999, start, layers)
    assert found.tolist() == dense_frames(num_frames, frames, stride, start, layers).tolist()


def test_a_higher_fps_than_the_videos_repeats_frames() -> None:
    assert dense_frames(20, 8, 10 / 20, 0.0).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert dense_frames(3, 8, 10 / 20, 0.0).tolist() == [0, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("decoder", usable_decoders())
def test_clips_of_all_rates_span_the_same_time_with_any_decoder(
    decoder: str, mixed: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"stride": None, "fps": FPS, "num_streams": 1, "decoder": decoder, "crop_scales": [1.0]}
    recipe = tiny(data=data)
    numbers: dict[str, list[list[int]]] = {}

    def recorded(name: str, video: bytes, frames: np.ndarray) -> np.ndarray:
        numbers.setdefault(name, []).append(frames.tolist())
        return decode(name, video, frames)

    decode = clips_module.decode
    monkeypatch.setattr(clips_module, "decode", recorded)
    clips: list[VideoClips] = [TrainClips(mixed, recipe)[n] for n in range(len(RATES))]
    views = EvaluationClips(mixed, recipe, views=(2, 1))
    clips += [views[n] for n in range(len(RATES))]
    expected = np.arange(recipe.data.frames) / FPS
    for video in clips:
        assert video.skipped is None
        for clip in video.clips:
            # Half a frame of the slowest, and rounding of the grey levels.
            assert np.abs(seconds(clip) - expected).max() < 0.5 / 24 + 0.04
    monkeypatch.setattr(clips_module, "decode", decode)
    reference = TrainClips(mixed, tiny(data={**data, "decoder": "pyav"}))
    own = [reference.stride(0, sample) for sample in mixed.index(0).samples]
    assert own == pytest.approx([float(RATES[s.key.replace("_", ".")]) / FPS
                                 for s in mixed.index(0).samples], rel=1e-5)  # fmt: skip
    assert len(numbers[decoder]) == 2 * len(RATES)


def test_the_loader_gives_the_clips_of_the_stride_bit_by_bit(
    demo_shards: Path, tiny: MakeRecipe
) -> None:
    """The demo's videos have 12 frames per second; some settings exceed their 12 frames."""
    shards = ShardSet(demo_shards / "train")
    for stride in (1, 2):
        for make in (TrainClips, EvaluationClips):
            by_stride = make(shards, tiny(data={"stride": stride}))
            by_fps = make(shards, tiny(data={"stride": None, "fps": 12 / stride}))
            for number in range(4):
                assert torch.equal(by_stride[number].clips[0], by_fps[number].clips[0])


def test_detection_samples_around_the_keyframe(
    ava: AvaSet, ava_recipe: Callable[..., DetectRecipe]
) -> None:
    shards = ShardSet(ava.shards)
    rate = read_facts(shards.path(0), shards.index(0).samples)[0].fps
    by_stride = TrainKeyframes(shards, ava_recipe(data={"stride": 2}))
    by_fps = TrainKeyframes(shards, ava_recipe(data={"stride": None, "fps": rate / 2}))
    assert torch.equal(by_stride[3].clips[0], by_fps[3].clips[0])


def test_an_altered_video_is_skipped_as_with_a_stride(
    mixed: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardSet, "read", lambda *_: b"no video")
    recipe = tiny(data={"stride": None, "fps": FPS, "num_streams": 1})
    for clips in (TrainClips(mixed, recipe), EvaluationClips(mixed, recipe)):
        skipped = clips[0].skipped
        assert skipped is not None and "InvalidDataError" in skipped.kind


def test_the_central_clip_of_a_file_spans_the_time(tmp_path: Path, tiny: MakeRecipe) -> None:
    data = tiny(data={"stride": None, "fps": FPS}).data
    for name, rate in RATES.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(brightening(rate))
        expected = np.arange(data.frames) / FPS
        assert np.abs(seconds(central_clip(path, data)) - expected).max() < 0.5 / 24 + 0.04


@given(
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from([24.0, 25.0, 29.97, 30.0, 60.0]),
    st.floats(2, 90).map(lambda fps: round(fps, 2)),
    st.integers(1, 150),
)
def test_windows_take_the_frames_nearest_to_their_times_and_reach_the_end(
    frames: int, hop: int, rate: float, fps: float, num_frames: int
) -> None:
    shape = WindowShape(frames, 1, hop, (16, 16), "dense", fps)
    step = shape.step_at(rate)
    windows = list(slide(range(num_frames), shape, lambda number: number, step))
    if num_frames <= math.floor((frames - 1) * step + Fraction(1, 2)):
        (only,) = windows
        assert only.frames == view_frames(num_frames, frames, rate / fps, "dense").tolist()
        return
    for window in windows:
        times = (np.array(window.frames) - window.frames[0]) / rate
        # The first frame is rounded as well.
        assert np.abs(times - np.arange(frames) / fps).max() <= 1 / rate + 1e-9
        assert max(window.frames) < num_frames
    if hop <= frames:
        covered = {n for w in windows for n in range(w.start, min(w.stop, num_frames))}
        assert covered == set(range(num_frames))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 90))
def test_windows_at_a_whole_ratio_are_those_of_the_stride(
    frames: int, stride: int, hop: int, num_frames: int
) -> None:
    by_stride = WindowShape(frames, stride, hop * stride, (16, 16), "dense")
    by_fps = WindowShape(frames, 1, hop, (16, 16), "dense", 30 / stride)
    step = Fraction(stride)
    assert list(slide(range(num_frames), by_fps, int, step)) == list(
        slide(range(num_frames), by_stride, int)
    )
    assert WindowShape(frames, 1, hop, (16, 16), "dense", 7.5).step_at(30.0) == 4


def test_windows_of_files_span_the_time() -> None:
    shape = WindowShape(8, 1, 8, (16, 16), "dense", FPS)
    for rate in RATES.values():
        *batches, found = read_windows(io.BytesIO(brightening(rate)), None, shape, batch=9)
        assert isinstance(found, Windows)
        assert len(found.start_s) == 3  # 1.6 s each; the last moved to the end of 4 s
        np.testing.assert_allclose(found.start_s[:2], [0, 1.6], atol=0.5 / 24 + 1e-3)
        for clip in torch.from_numpy(np.concatenate(batches)):
            assert np.abs(seconds(clip) - np.arange(8) / FPS).max() < 1 / 24 + 0.04
