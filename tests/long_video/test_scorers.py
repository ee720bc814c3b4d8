"""Scores mean what they say: motion is found, still regions are not, draws are the video's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from arvideo_ds.errors import UserError
from arvideo_ds.long_video.optical_flow import optical_flow
from arvideo_ds.long_video.score_store import SCORERS
from arvideo_ds.long_video.scorers import RULES, Piece, make_scorer

PATCH = (2, 8, 8)


def texture(height: int, width: int) -> torch.Tensor:
    """A smooth random picture, 0..1."""
    shape = (1, 1, height // 12, width // 12)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0, 0]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (1, 0), (0, -2), (5, 3), (-8, 6)])
def test_flow_is_the_way_that_a_picture_was_moved(x: int, y: int) -> None:
    picture = texture(120, 144)
    first, second = (picture[20:100, 20:124], picture[20 - y : 100 - y, 20 - x : 124 - x])
    flow = optical_flow(first[None], second[None])[0, :, 12:-12, 12:-12]
    expected = torch.tensor([x, y], dtype=torch.float32)[:, None, None]
    # Within a tenth of the way: long ways are found less exactly.
    assert (flow - expected).norm(dim=0).median() < 0.15 + 0.1 * math.hypot(x, y)


def test_a_flat_picture_does_not_move() -> None:
    flat = torch.full((1, 40, 48), 0.5)
    assert optical_flow(flat, flat + 0.1).abs().max() < 1e-3


@pytest.mark.gpu
def test_a_gpu_finds_the_same_flow() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    picture = texture(120, 144)
    pair = picture[None, 20:100, 20:124], picture[None, 17:97, 15:119]
    flow = optical_flow(*(frame.cuda() for frame in pair)).cpu()
    torch.testing.assert_close(flow, optical_flow(*pair), rtol=1e-3, atol=1e-2)


def moving_square(speed: int) -> Piece:
    """A textured square on its way to the right over a still background: two windows."""
    background = (255 * texture(48, 96)).byte().numpy()
    square = (255 * texture(36, 36)).byte().numpy()[:16, 20:36]
    frames = np.repeat(background[None], 32, axis=0)
    for number, frame in enumerate(frames):
        frame[16:32, 8 + speed * number : 24 + speed * number] = square
    return Piece("v", 0, frames[..., None].repeat(3, axis=-1).reshape(2, 16, 48, 96, 3))


@pytest.mark.parametrize("name", ["flow", "everest"])
def test_what_moves_has_the_larger_scores(name: str) -> None:
    speed = 2
    scores = make_scorer(name, PATCH, tokenizer=None, device="cpu")(moving_square(speed)).scores
    assert scores.shape == (2, 8, 6, 12)
    assert scores.dtype == np.float32
    still = scores[:, :, [0, 1, 4, 5]]
    assert scores[:, :, 2:4].max(axis=(2, 3)).min() > 4 * still.mean()
    place = scores[:, :, 2:4].mean(axis=2).argmax(axis=-1).ravel()
    middle = (8 + 16 / 2 + 2 * speed * np.arange(16)) / 8 - 0.5
    assert np.abs(place - middle).max() <= 1.5


def test_everest_is_the_distance_of_a_patch_to_itself_one_time_earlier() -> None:
    piece = moving_square(2)
    scores = RULES["everest"][0](piece, PATCH)
    deviation = np.array([0.229, 0.224, 0.225])
    cube = (piece.frames[1] / 255 / deviation).reshape(8, 2, 6, 8, 12, 8, 3)
    expected = np.linalg.norm((cube[5] - cube[4])[:, 2, :, 7].ravel())
    assert scores[1, 5, 2, 7] == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(scores[:, 0], scores[:, 1])


def test_random_scores_are_the_videos_own_whatever_windows_come_together() -> None:
    frames = np.zeros((3, 16, 16, 24, 3), np.uint8)
    together = RULES["random"][0](Piece("v", 0, frames), PATCH)
    alone = [RULES["random"][0](Piece("v", n, frames[:1]), PATCH)[0] for n in range(3)]
    assert np.array_equal(together, np.stack(alone))
    assert not np.array_equal(alone[0], alone[1])
    assert not np.array_equal(together, RULES["random"][0](Piece("w", 0, frames), PATCH))


def test_uniform_takes_every_seventh_time_of_the_video_first() -> None:
    frames = np.zeros((2, 16, 16, 24, 3), np.uint8)
    scores = RULES["uniform"][0](Piece("v", 3, frames), PATCH).reshape(16, -1)
    first = np.flatnonzero(scores.min(axis=1) >= 1)
    # The video's times 24 to 39.
    assert (24 + first).tolist() == [28, 35]
    assert np.delete(scores, first, axis=0).max() < 0.5


def test_command_lines_know_every_scorer() -> None:
    assert {*RULES, "tokenizer"} == set(SCORERS)


def test_scorers_that_do_not_go_with_their_settings_are_refused() -> None:
    with pytest.raises(UserError, match="one frame in each"):
        make_scorer("flow", (1, 8, 8), tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="no multiple of its 3 frames"):
        make_scorer("random", (3, 8, 8), tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="needs it"):
        make_scorer("tokenizer", PATCH, tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="do not go together"):
        make_scorer("flow", PATCH, tokenizer="run", device="cpu")
    for name, path in (("everest", None), ("tokenizer", "run")):
        with pytest.raises(UserError, match="makes one time of a window of 16 frames"):
            make_scorer(name, (16, 8, 8), tokenizer=path, device="cpu")
