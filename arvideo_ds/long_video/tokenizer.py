"""The adaptive tokenizer of LVMAE on one page: a clip as codes, and how important each is.

    encode     3D convolutions reduce the clip to the token grid, with a small latent per token
    score      how much each token changes from one time to the next (importance.py)
    choose     the k most important tokens are kept, the other latents become 0 (importance.py)
    quantise   each number is rounded to one of a few levels: a token is one of the codes (FSQ)
    decode     3D convolutions reconstruct the clip

The scorer learns which tokens are needed to decode the clip. Source: LVMAE (arXiv 2411.13683),
section 3; network after MAGVIT (arXiv 2212.05199), appendix; FSQ (arXiv 2309.15505).

B clips, T H W frames and pixels, t h w token grid, N tokens, D numbers of a latent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.config.tokenizer import TokenizerSettings, halvings
from arvideo_ds.errors import needs_extra
from arvideo_ds.geometry import CHANNELS, Geometry, Triple
from arvideo_ds.long_video.importance import (
    Float32Conv3d,
    TokenScorer,
    normalize_scores,
    perturbed_top_k,
    top_k,
)
from arvideo_ds.models.cubes import unit_pixels
from arvideo_ds.models.weight_files import load_state, read_weights
from arvideo_ds.runs import run_folder

# MAGVIT's groups; with fewer channels per group, a norm would remove a clip's brightness.
_GROUPS, _GROUP_CHANNELS = 32, 4


@dataclass(frozen=True)
class Reconstruction:
    """pixels: B T H W 3, float32, about 0..1. codes: B t h w, int64, of all tokens.
    kept: B t h w, share of each latent that is decoded, 0..1."""

    pixels: Tensor
    codes: Tensor
    kept: Tensor


class Tokenizer(nn.Module):
    """Encoder, scorer, quantiser and decoder. Clips may be longer and larger than in training."""

    def __init__(self, patch: Triple, settings: TokenizerSettings) -> None:
        super().__init__()
        with needs_extra("tokenizer"):
            from vector_quantize_pytorch import FSQ
        self.patch, self.settings = patch, settings
        self.encoder = ConvEncoder(patch, settings)
        self.scorer = TokenScorer(patch, settings.filters)
        self.quantizer = FSQ(list(settings.levels))
        self.decoder = ConvDecoder(patch, settings)

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Reconstruction:
        """Encode clips B T H W 3 (uint8, or floating 0..1) and decode them from the chosen tokens.

        keys: int64, B; they determine the noise of the choice in training. Without them exactly the
        k best are chosen. The tokens of the first time are always kept.
        """
        pixels = centred(clips)
        latents = self.encoder(pixels)
        kept = self.choose(self.scorer(pixels), keys)
        quantized, _ = self._quantize(latents * kept[:, None])
        with torch.no_grad():
            _, codes = self._quantize(latents)
        return Reconstruction(self.decoder(quantized), codes, kept)

    def choose(self, scores: Tensor, keys: Tensor | None) -> Tensor:
        """Kept share of each token, B t h w. scores: importance from the second time on."""
        batch, later, rows, columns = scores.shape
        grid = (later + 1, rows, columns)
        k = self.settings.kept(Geometry.whole(grid, (1, 1, 1))) - rows * columns
        flat = normalize_scores(scores.flatten(1))
        if keys is None:
            chosen = top_k(flat, k).to(scores.dtype)
        else:
            settings = self.settings
            chosen = perturbed_top_k(flat, k, keys, samples=settings.samples, sigma=settings.sigma)
        first = scores.new_ones(batch, 1, rows, columns)
        return torch.cat([first, chosen.view_as(scores)], dim=1)

    @torch.no_grad()
    def tokens(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Importance (float32, larger = more) and code (int64) of every token: each B t h w.

        windows: B T H W 3, uint8. The first time has the importance of the second. Codes are of the
        unmasked latents.
        """
        pixels = centred(windows)
        scores = self.scorer(pixels)
        _, codes = self._quantize(self.encoder(pixels))
        return torch.cat([scores[:, :1], scores], dim=1), codes

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents B D t h w to rounded ones, and their codes B t h w."""
        grid = latents.shape[2:]
        # Three axes: FSQ would guess the meaning of more.
        flat, codes = self.quantizer(rearrange(latents, "b d t h w -> b (t h w) d"))
        quantized = rearrange(flat, "b (t h w) d -> b d t h w", t=grid[0], h=grid[1], w=grid[2])
        return quantized, codes.long().unflatten(1, grid)


class ConvEncoder(nn.Module):
    """Pixels B 3 T H W -> latents B D t h w, float32, not yet bounded or rounded."""

    def __init__(self, patch: Triple, settings: TokenizerSettings) -> None:
        super().__init__()
        widths = _widths(settings)
        self.entry = _conv(CHANNELS, widths[0])
        # One list, for activation checkpointing and compilation (engine/build.py).
        self.blocks = nn.ModuleList(_residuals(widths[0], widths[0], settings.blocks))
        for stride, (before, width) in zip(
            halvings(patch), itertools.pairwise(widths), strict=True
        ):
            self.blocks.append(Downsample(stride))
            self.blocks.extend(_residuals(before, width, settings.blocks))
        self.blocks.extend(_residuals(widths[-1], widths[-1], settings.blocks))
        self.norm = _norm(widths[-1])
        self.exit = Float32Conv3d(widths[-1], len(settings.levels), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.entry(pixels.to(self.entry.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.exit(F.silu(self.norm(x)))


class ConvDecoder(nn.Module):
    """Latents B D t h w -> pixels B T H W 3, float32, about 0..1."""

    def __init__(self, patch: Triple, settings: TokenizerSettings) -> None:
        super().__init__()
        *others, deepest = _widths(settings)
        self.entry = _conv(len(settings.levels), deepest)
        self.blocks = nn.ModuleList(_residuals(deepest, deepest, 2 * settings.blocks))
        before = deepest
        for stride, width in zip(reversed(halvings(patch)), reversed(others), strict=True):
            self.blocks.append(Upsample(before, stride))
            self.blocks.extend(_residuals(before, width, settings.blocks))
            before = width
        self.norm = _norm(before)
        self.exit = _conv(before, CHANNELS)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.entry(latents.to(self.entry.weight.dtype))
        for block in self.blocks:
            x = block(x)
        pixels = self.exit(F.silu(self.norm(x))).float()
        return rearrange(pixels / 2 + 0.5, "b c t h w -> b t h w c")


class Residual(nn.Module):
    """Pre-activation: norm, swish, convolution, twice; the shortcut only changes the width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Downsample(nn.Module):
    """The mean of neighbouring voxels."""

    def __init__(self, stride: Triple) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's average pooling has no bfloat16 on a CPU.
        t, h, w = self.stride
        return reduce(x, "b c (t p) (h q) (w r) -> b c t h w", "mean", p=t, q=h, r=w)


class Upsample(nn.Module):
    """Repeats every voxel, then a convolution."""

    def __init__(self, width: int, stride: Triple) -> None:
        super().__init__()
        self.stride = tuple(float(step) for step in stride)
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.stride, mode="nearest"))


def centred(clips: Tensor) -> Tensor:
    """Clips B T H W 3 to the input of the networks: B 3 T H W, float32, -1..1."""
    return rearrange(2 * unit_pixels(clips) - 1, "b t h w c -> b c t h w")


def _widths(settings: TokenizerSettings) -> list[int]:
    return [settings.filters * multiplier for multiplier in settings.multipliers]


def _residuals(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    return [Residual(outputs if number else inputs, outputs) for number in range(count)]


def _conv(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(_GROUPS, max(1, width // _GROUP_CHANNELS)), width)


def load_tokenizer(path: Path) -> Tokenizer:
    """A trained tokenizer, in evaluation mode, on the CPU.

    path: folder of a finished run of `arvideo tokenizer`, whose averaged weights are preferred; or
    a file of its weights in a folder with the run's recipe.yaml. Errors: `UserError` where weights
    or recipe are missing, damaged, or do not fit together.
    """
    files = [path / name for name in (run_folder.EMA_MODEL, run_folder.MODEL)]
    file = next((file for file in files if file.is_file()), path)
    state = read_weights(file)
    recipe = run_folder.read_recipe(path if path.is_dir() else path.parent, TokenizerRecipe)
    tokenizer = Tokenizer(recipe.patch, recipe.tokenizer)
    load_state(tokenizer, state, f"{file} does not fit the {run_folder.RECIPE} in its folder")
    return tokenizer.eval().requires_grad_(requires_grad=False)
