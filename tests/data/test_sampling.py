"""Which frames make a clip: in range, ascending, with the stride asked for, from every start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.data.sampling import (
    aligned_frames,
    dense_frames,
    segment_frames,
    train_frames,
    view_frames,
    window_frames,
)

NUM_FRAMES, FRAMES, STRIDES = st.integers(1, 400), st.integers(1, 40), st.integers(1, 12)
SHARES = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


@given(NUM_FRAMES, FRAMES, STRIDES, st.sampled_from(["dense", "uniform"]), st.integers(0, 99))
def test_frames_are_as_many_as_asked_in_range_and_ascending(
    num_frames: int, frames: int, stride: int, sampling: str, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    for found in (
        train_frames(num_frames, frames, stride, sampling, generator),
        view_frames(num_frames, frames, stride, sampling),
    ):
        assert found.shape == (frames,)
        assert found.dtype == np.int64
        assert found.min() >= 0
        assert found.max() < num_frames
        assert (np.diff(found) >= 0).all()


@given(FRAMES, STRIDES, st.integers(0, 100), SHARES)
def test_dense_keeps_the_stride_exactly_where_it_fits(
    frames: int, stride: int, spare: int, start: float
) -> None:
    num_frames = (frames - 1) * stride + 1 + spare
    found = dense_frames(num_frames, frames, stride, start)
    assert (np.diff(found) == stride).all()


@given(st.integers(1, 60), st.integers(2, 20), STRIDES, SHARES)
def test_a_short_video_takes_the_largest_stride_that_fits(
    num_frames: int, frames: int, stride: int, start: float
) -> None:
    found = dense_frames(num_frames, frames, stride, start)
    if num_frames >= frames:
        largest = max(s for s in range(1, num_frames) if (frames - 1) * s < num_frames)
        assert (np.diff(found) == min(stride, largest)).all()
    else:
        wanted = [*range(num_frames), *[num_frames - 1] * (frames - num_frames)]
        assert found.tolist() == wanted


@pytest.mark.parametrize(("num_frames", "frames", "stride"), [(20, 4, 4), (13, 4, 4), (9, 8, 1)])
def test_every_start_is_drawn_about_equally_often(
    num_frames: int, frames: int, stride: int
) -> None:
    generator = np.random.default_rng(0)
    draws = 3000
    starts = [
        int(train_frames(num_frames, frames, stride, "dense", generator)[0]) for _ in range(draws)
    ]
    possible = num_frames - (frames - 1) * stride
    counts = np.bincount(starts, minlength=possible)
    assert len(counts) == possible
    assert counts.min() > 0.7 * draws / possible


@given(st.integers(1, 30), st.integers(0, 300), st.data())
def test_uniform_takes_one_frame_of_each_segment(
    frames: int, spare: int, data: st.DataObject
) -> None:
    num_frames = frames + spare
    places = np.array(data.draw(st.lists(SHARES, min_size=frames, max_size=frames)))
    found = segment_frames(num_frames, frames, places)
    for segment, frame in enumerate(found):
        # The frame covers [frame, frame + 1); it must overlap its segment.
        assert frame * frames < (segment + 1) * num_frames
        assert (frame + 1) * frames > segment * num_frames


def test_uniform_reaches_every_frame() -> None:
    generator = np.random.default_rng(0)
    drawn = [train_frames(23, 5, 1, "uniform", generator) for _ in range(500)]
    assert set(np.concatenate(drawn).tolist()) == set(range(23))


@given(FRAMES, STRIDES, st.integers(0, 100))
def test_the_central_clip_leaves_as_much_before_as_after(
    frames: int, stride: int, spare: int
) -> None:
    num_frames = (frames - 1) * stride + 1 + spare
    found = view_frames(num_frames, frames, stride, "dense")
    assert abs(found[0] - (num_frames - 1 - found[-1])) <= 1


@given(NUM_FRAMES, FRAMES, STRIDES, st.sampled_from(["dense", "uniform"]), st.integers(2, 6))
def test_temporal_views_are_in_range_ordered_and_reach_both_ends(
    num_frames: int, frames: int, stride: int, sampling: str, views: int
) -> None:
    found = [view_frames(num_frames, frames, stride, sampling, v, views) for v in range(views)]
    assert all(len(view) == frames and 0 <= view.min() <= view.max() < num_frames for view in found)
    assert all((later >= sooner).all() for sooner, later in itertools.pairwise(found))
    if sampling == "dense":
        assert (found[0][0], found[-1][-1]) == (0, num_frames - 1)


@given(NUM_FRAMES, st.integers(1, 20), STRIDES, st.sampled_from([1, 2, 4]), SHARES)
def test_aligned_clips_are_pieces_of_the_windows_that_begin_at_a_token(
    num_frames: int, tokens: int, stride: int, tubelet: int, start: float
) -> None:
    frames = tokens * tubelet
    found = aligned_frames(num_frames, frames, stride, tubelet, start)
    assert found.shape == (frames,)
    assert found.max() < num_frames
    time, rest = divmod(int(found[0]), stride * tubelet)
    assert rest == 0
    video = window_frames(num_frames, stride, 16).ravel()
    expected = video[time * tubelet :][:frames]
    assert found[: len(expected)].tolist() == expected.tolist()
    # Beyond the windows there is the last frame, of videos that are too short.
    assert (found[len(expected) :] == video[-1]).all()
    if -(-num_frames // stride) >= frames:
        assert (np.diff(found) == stride).all()


def test_aligned_clips_begin_at_every_token_that_leaves_room() -> None:
    generator = np.random.default_rng(0)
    starts = [int(aligned_frames(61, 8, 3, 2, generator.random())[0]) for _ in range(300)]
    # 21 sampled frames; 13 more than a clip, so 7 starts.
    assert sorted(set(starts)) == [0, 6, 12, 18, 24, 30, 36]
    assert np.bincount(np.array(starts) // 6).min() > 20


@pytest.mark.parametrize(("num_frames", "stride", "windows"), [(1, 4, 1), (64, 4, 1), (65, 4, 2)])
def test_windows_touch_and_the_last_repeats_its_last_frame(
    num_frames: int, stride: int, windows: int
) -> None:
    found = window_frames(num_frames, stride, 16)
    sampled = list(range(0, num_frames, stride))
    assert found.shape == (windows, 16)
    assert found.ravel().tolist() == sampled + [sampled[-1]] * (16 * windows - len(sampled))


@given(NUM_FRAMES, FRAMES, STRIDES, st.sampled_from(["dense", "uniform"]), st.integers(1, 8))
def test_clips_of_parts_follow_each_other_and_one_part_is_the_whole_video(
    num_frames: int, frames: int, stride: int, sampling: str, parts: int
) -> None:
    def clips(count: int) -> list[np.ndarray]:
        generator = np.random.default_rng(3)
        return [
            train_frames(num_frames, frames, stride, sampling, generator, part=(n, count))
            for n in range(count)
        ]

    for before, after in itertools.pairwise(clips(parts)):
        assert (before <= after).all()
    plain = train_frames(num_frames, frames, stride, sampling, np.random.default_rng(3))
    assert np.array_equal(clips(1)[0], plain)
