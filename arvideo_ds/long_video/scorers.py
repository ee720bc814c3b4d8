"""What a token is worth predicting, by five rules behind one interface.

A scorer takes consecutive windows of one video and gives a score for every token, larger for more
important, and, where it has them, codes. All it draws is a function of the video's key. The pass
gives it one window at a time: in larger batches some kernels round in another way, and how many
windows are there at once is a matter of memory.

tokenizer  importance that the adaptive tokenizer learned, and its codes (LVMAE)
flow       mean length of the optical flow in the token, pixels per sampled frame
everest    distance to the same place's patch one time earlier, as EVEREST takes it between
           embeddings; here between standardised pixels, which need no network
uniform    every 7th time of the video before all others
random     no matter what

B windows of one video, F frames, H W pixels, t h w tokens of a window.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange, reduce

from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.long_video import optical_flow as flow
from arvideo_ds.long_video.score_store import WINDOW
from arvideo_ds.models.cubes import standardize, to_cubes
from arvideo_ds.randomness import score_generator

# Times from one that the uniform rule chooses to the next (LVMAE's baseline).
UNIFORM_STEP = 7
TOKENIZER = "tokenizer"
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Piece:
    """Consecutive windows of the video `key`: frames B F H W 3 (uint8), the first one's number."""

    key: str
    first: int
    frames: np.ndarray


@dataclass(frozen=True)
class Scored:
    """Scores B t h w (float32), larger for more important; codes B t h w (int64), if any."""

    scores: np.ndarray
    codes: np.ndarray | None = None


class Scorer(Protocol):
    """One rule. Scorers travel to the processes that decode, unless `on_device`."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the scores, besides the windows and the tokenizer."""

    @property
    def tokenizer(self) -> str | None:
        """Hash of the tokenizer's weights."""

    @property
    def levels(self) -> tuple[int, ...] | None:
        """Levels of its codes."""

    @property
    def on_device(self) -> bool:
        """Whether it works on an accelerator, and so in the main process."""

    def __call__(self, piece: Piece) -> Scored: ...


def everest(piece: Piece, patch: Triple) -> np.ndarray:
    """Euclidean distance of a cube's standardised pixels to those one time earlier.

    The first time of a window takes the second one's. Source: EVEREST (arXiv 2211.10636).
    """
    cubes = standardize(to_cubes(torch.from_numpy(piece.frames), patch))
    times, height, width = _grid(piece, patch)
    by_time = rearrange(cubes, "b (t h w) p -> b t h w p", t=times, h=height, w=width)
    distances = (by_time[:, 1:] - by_time[:, :-1]).norm(dim=-1)
    return torch.cat([distances[:, :1], distances], dim=1).numpy()


def flow_length(piece: Piece, patch: Triple) -> np.ndarray:
    """Mean length of the optical flow between the frames of a token, in pixels per frame."""
    frames = torch.from_numpy(piece.frames).float() / 255
    grey = (frames * torch.tensor(_GREY)).sum(-1)
    tokens = rearrange(grey, "b (t f) y x -> b t f y x", f=patch[0])
    first, second = tokens[:, :, :-1], tokens[:, :, 1:]
    ways = flow.optical_flow(first.flatten(0, 2), second.flatten(0, 2)).norm(dim=1)
    lengths = ways.unflatten(0, first.shape[:3])
    _, high, wide = patch
    return reduce(
        lengths, "b t f (h p) (w q) -> b t h w", "mean", p=high, q=wide
    ).numpy()  # fmt: skip


def random(piece: Piece, patch: Triple) -> np.ndarray:
    """Uniform in [0, 1), a function of the video's key and the window."""
    numbers = range(piece.first, piece.first + len(piece.frames))
    grid = _grid(piece, patch)
    drawn = [score_generator(piece.key, n).random(grid, dtype=np.float32) for n in numbers]
    return np.stack(drawn)


def uniform(piece: Piece, patch: Triple) -> np.ndarray:
    """Every 7th time of the video has scores of 1 and more, all others less than a half.

    Within each of the two, the order is that of `random`: a budget that ends between them is
    spread over the whole video.
    """
    windows, times = len(piece.frames), _grid(piece, patch)[0]
    number = piece.first * times + np.arange(windows * times)
    chosen = (number % UNIFORM_STEP == 0).reshape(windows, times, 1, 1)
    return chosen.astype(np.float32) + random(piece, patch) / 2


_Rule = Callable[[Piece, Triple], np.ndarray]
RULES: dict[str, tuple[_Rule, dict[str, Any]]] = {
    "flow": (
        flow_length,
        {"levels": flow.LEVELS, "iterations": flow.ITERATIONS, "radius": flow.RADIUS},
    ),
    "everest": (everest, {"of": "standardised pixels"}),
    "uniform": (uniform, {"step": UNIFORM_STEP}),
    "random": (random, {}),
}


@dataclass(frozen=True)
class RuleScorer:
    """A rule that needs no weights; it works in the processes that decode."""

    name: str
    patch: Triple
    tokenizer: str | None = None
    levels: tuple[int, ...] | None = None
    on_device: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return RULES[self.name][1]

    def __call__(self, piece: Piece) -> Scored:
        return Scored(RULES[self.name][0](piece, self.patch))


@dataclass
class TokenizerScorer:
    """Importance and codes of a trained tokenizer; it is loaded where it is first used."""

    path: str
    patch: Triple
    device: str
    name: str = TOKENIZER
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def on_device(self) -> bool:
        return self.device != "cpu"

    @functools.cached_property
    def tokenizer(self) -> str:
        """Hash of every weight with its name, wherever the file lies."""
        digest = hashlib.sha256()
        for name, values in sorted(self._network.state_dict().items()):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.cached_property
    def levels(self) -> tuple[int, ...]:
        return tuple(int(level) for level in self._network.settings.levels)

    @torch.no_grad()
    def __call__(self, piece: Piece) -> Scored:
        windows = torch.from_numpy(piece.frames).to(self.device)
        try:
            scores, codes = self._network.tokens(windows)
        except torch.OutOfMemoryError:
            count, frames, height, width, _ = windows.shape
            raise UserError(
                f"the GPU's memory is too small for the tokenizer {self.path} on {count} window(s) "
                f"of {frames} frames of {height} x {width}. Nothing else may run on it; else score "
                "on the CPU (export DS_ACCELERATOR=cpu), or choose a smaller --size."
            ) from None
        return Scored(scores.float().cpu().numpy(), codes.cpu().numpy())

    @functools.cached_property
    def _network(self) -> Any:
        from arvideo_ds.long_video.tokenizer import load_tokenizer

        network = load_tokenizer(Path(self.path))
        if tuple(network.patch) != self.patch:
            raise UserError(
                f"the tokenizer {self.path} has tokens of {list(network.patch)} frames, rows and "
                f"columns, and the scores are to be of {list(self.patch)}. Score with its own."
            )
        return network.to(self.device).eval()

    def __getstate__(self) -> dict[str, Any]:
        """Other processes load their own: no weights travel."""
        return {key: value for key, value in self.__dict__.items() if key != "_network"}


def make_scorer(name: str, patch: Triple, *, tokenizer: str | None, device: str) -> Scorer:
    """The scorer of this name. Errors: `UserError` where it does not go with the patch or lacks
    its tokenizer."""
    if name == "flow" and patch[0] < 2:
        raise UserError(
            f"--scorer flow measures motion within a token, and --patch {list(patch)} has one "
            "frame in each. Take everest, or tokens of two frames."
        )
    if (name == TOKENIZER) != (tokenizer is not None):
        raise UserError(
            f"--scorer {name} and --tokenizer {tokenizer} do not go together: --tokenizer RUN is "
            f"for --scorer {TOKENIZER}, which needs it."
        )
    if WINDOW % patch[0]:
        raise UserError(
            f"--patch {list(patch)}: windows of {WINDOW} frames are no multiple of its "
            f"{patch[0]} frames."
        )
    if name in (TOKENIZER, "everest") and patch[0] == WINDOW:
        raise UserError(
            f"--scorer {name} compares a token with the one before it, and --patch {list(patch)} "
            f"makes one time of a window of {WINDOW} frames. Take flow, or tokens of fewer frames."
        )
    if tokenizer is None:
        return RuleScorer(name, patch)
    return TokenizerScorer(tokenizer, patch, device)


def _grid(piece: Piece, patch: Triple) -> Triple:
    frames, height, width = piece.frames.shape[1:4]
    return frames // patch[0], height // patch[1], width // patch[2]
