"""The scorers: learned importance, optical flow, change of the pixels.

tokenizer  importance learned by the adaptive tokenizer, and its codes (LVMAE)
flow       mean length of the optical flow in the token, pixels per sampled frame
everest    distance to the patch at the same place one time earlier, between standardised pixels
           (EVEREST: between embeddings)

B windows of one video, F frames, H W pixels, t h w tokens of a window.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce

from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.long_video import optical_flow as flow
from arvideo_ds.long_video.score_store import WINDOW
from arvideo_ds.long_video.scorers import TOKENIZER, Piece, Scored
from arvideo_ds.models.cubes import standardize, to_cubes

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class _WithoutWeights:
    patch: Triple
    tokenizer: ClassVar[None] = None
    levels: ClassVar[None] = None
    on_device: ClassVar[bool] = False


@dataclass(frozen=True)
class Flow(_WithoutWeights):
    """Mean length of the optical flow between the frames of a token, in pixels per frame."""

    name = "flow"
    settings: ClassVar = {
        "levels": flow.LEVELS,
        "iterations": flow.ITERATIONS,
        "radius": flow.RADIUS,
    }

    def __post_init__(self) -> None:
        if self.patch[0] < 2:
            raise UserError(
                f"--scorer flow measures motion within a token, and --patch {list(self.patch)} has "
                "one frame in each. Use everest, or tokens of two frames."
            )

    def __call__(self, piece: Piece) -> Scored:
        frames = torch.from_numpy(piece.frames).float() / 255
        grey = (frames * torch.tensor(_GREY)).sum(-1)
        tokens = rearrange(grey, "b (t f) y x -> b t f y x", f=self.patch[0])
        first, second = tokens[:, :, :-1], tokens[:, :, 1:]
        motion = flow.optical_flow(first.flatten(0, 2), second.flatten(0, 2)).norm(dim=1)
        lengths = motion.unflatten(0, first.shape[:3])
        _, p, q = self.patch
        return Scored(reduce(lengths, "b t f (h p) (w q) -> b t h w", "mean", p=p, q=q).numpy())


@dataclass(frozen=True)
class Everest(_WithoutWeights):
    """Euclidean distance of a cube's standardised pixels to the cube one time earlier.

    The first time of a window has the second's scores. Source: EVEREST (arXiv 2211.10636).
    """

    name = "everest"
    settings: ClassVar = {"of": "standardised pixels"}

    def __post_init__(self) -> None:
        _require_several_times(self.name, self.patch)

    def __call__(self, piece: Piece) -> Scored:
        t, h, w = Geometry.whole(piece.frames.shape[1:4], self.patch).grid
        cubes = standardize(to_cubes(torch.from_numpy(piece.frames), self.patch))
        by_time = rearrange(cubes, "b (t h w) p -> b t h w p", t=t, h=h, w=w)
        distances = (by_time[:, 1:] - by_time[:, :-1]).norm(dim=-1)
        return Scored(torch.cat([distances[:, :1], distances], dim=1).numpy())


@dataclass
class TokenizerScorer:
    """Importance and codes of a trained tokenizer, loaded at first use."""

    patch: Triple
    path: str
    device: str
    name: ClassVar[str] = TOKENIZER
    settings: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        _require_several_times(self.name, self.patch)

    @property
    def on_device(self) -> bool:
        return self.device != "cpu"

    @functools.cached_property
    def tokenizer(self) -> str:
        """Hash of all weights and their names."""
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
                f"of {frames} frames of {height} x {width}. Stop other programs on it, score on "
                "the CPU (export DS_ACCELERATOR=cpu), or choose a smaller --size."
            ) from None
        return Scored(scores.float().cpu().numpy(), codes.cpu().numpy())

    @functools.cached_property
    def _network(self) -> Any:
        from arvideo_ds.long_video.tokenizer import load_tokenizer

        network = load_tokenizer(Path(self.path))
        if tuple(network.patch) != self.patch:
            raise UserError(
                f"the tokenizer {self.path} has tokens of {list(network.patch)} frames, rows and "
                f"columns, not {list(self.patch)}. Score with its own patch."
            )
        return network.to(self.device).eval()

    def __getstate__(self) -> dict[str, Any]:
        """Other processes load the weights themselves."""
        return {key: value for key, value in self.__dict__.items() if key != "_network"}


def _require_several_times(scorer: str, patch: Triple) -> None:
    if patch[0] == WINDOW:
        raise UserError(
            f"--scorer {scorer} compares a token with the previous one, and --patch {list(patch)} "
            f"makes one time of a window of {WINDOW} frames. Use flow, or tokens of fewer frames."
        )
