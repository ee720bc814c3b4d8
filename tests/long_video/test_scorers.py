"""Scores mean what they say: motion is found, still regions are not, names are checked."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from arvideo_ds.config.objectives import Rule
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.optical_flow import optical_flow
from arvideo_ds.long_video.scorers import Piece, make_scorer, scorer_name

PATCH = (2, 8, 8)
Run = Callable[..., subprocess.CompletedProcess[str]]


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
    scores = make_scorer("everest", PATCH, tokenizer=None, device="cpu")(piece).scores
    deviation = np.array([0.229, 0.224, 0.225])
    cube = (piece.frames[1] / 255 / deviation).reshape(8, 2, 6, 8, 12, 8, 3)
    expected = np.linalg.norm((cube[5] - cube[4])[:, 2, :, 7].ravel())
    assert scores[1, 5, 2, 7] == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_a_scorer_that_a_selection_rule_replaced_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UserError, match=f"decoder_mask={name} .* decoder.target_rule={name} "):
        scorer_name(name)
    assert name in get_args(Rule)


def test_an_unknown_scorer_is_refused_with_the_names_and_without_torch(run: Run) -> None:
    code = (
        "from arvideo_ds.long_video.scorers import scorer_name\n"
        "from arvideo_ds.errors import UserError\n"
        "import sys\n"
        "try: scorer_name('flows')\n"
        "except UserError as error: print(error, 'torch' in sys.modules)"
    )
    said = run(sys.executable, "-c", code).stdout
    assert "tokenizer, flow, everest. Did you mean 'flow'?" in said
    assert said.endswith("False\n")


def test_a_plugin_adds_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "brightness.py"
    plugin.write_text(
        """
from dataclasses import dataclass
from arvideo_ds.long_video.scorers import SCORERS, Scored

@SCORERS.register("brightness")
@dataclass
class Brightness:
    patch: tuple[int, int, int]
    name = "brightness"
    settings = {}
    tokenizer = levels = None
    on_device = False

    def __call__(self, piece):
        windows, frames, height, width, channels = piece.frames.shape
        t, h, w = self.patch
        cubes = piece.frames.reshape(windows, frames // t, t, height // h, h, width // w, w, 3)
        return Scored(cubes.mean(axis=(2, 4, 6, 7), dtype="float32"))
"""
    )
    monkeypatch.setenv("ARVIDEO_PLUGINS", str(plugin))
    scorer = make_scorer(scorer_name("brightness"), PATCH, tokenizer=None, device="cpu")
    piece = moving_square(2)
    assert scorer(piece).scores[1, 5, 2, 7] == pytest.approx(
        piece.frames[1, 10:12, 16:24, 56:64].mean(), rel=1e-5
    )


def test_scorers_that_do_not_go_with_their_settings_are_refused() -> None:
    with pytest.raises(UserError, match="one frame in each"):
        make_scorer("flow", (1, 8, 8), tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="not a multiple of its 3 frames"):
        make_scorer("everest", (3, 8, 8), tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="needs it"):
        make_scorer("tokenizer", PATCH, tokenizer=None, device="cpu")
    with pytest.raises(UserError, match="does not go together"):
        make_scorer("flow", PATCH, tokenizer="run", device="cpu")
    for name, path in (("everest", None), ("tokenizer", "run")):
        with pytest.raises(UserError, match="makes one time of a window of 16 frames"):
            make_scorer(name, (16, 8, 8), tokenizer=path, device="cpu")
