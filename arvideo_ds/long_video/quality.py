"""Quality of a tokenizer: reconstruction error, codes in use, importance of moving tokens.

B clips, T H W frames and pixels, t h w token grid, N tokens, V videos.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.data.loader import Batch, worker_count
from arvideo_ds.data.sampling import nearest
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.errors import UserError, needs_extra
from arvideo_ds.evaluation.scores import outputs_of
from arvideo_ds.geometry import num_kept
from arvideo_ds.host import available_cores
from arvideo_ds.long_video.tokenizer import Reconstruction, Tokenizer
from arvideo_ds.models.cubes import to_cubes, unit_pixels
from arvideo_ds.shards.demo_set import DEMO, scene
from arvideo_ds.shards.manifest import ShardSet

# Share of the tokens that LVMAE's decoder predicts.
BUDGET = 0.15


@dataclass(frozen=True)
class Quality:
    """Means over videos of the central clip's PSNR (dB) and SSIM, and the share of codes in use.

    code_usage: number of different codes over that of all codes, or of all tokens if fewer.
    """

    psnr_db: float
    ssim: float
    code_usage: float
    different_codes: int
    videos: int
    unreadable: int


def judge(
    reconstruct: Callable[[Batch], Reconstruction],
    shards: ShardSet,
    recipe: TokenizerRecipe,
    *,
    num_workers: int,
    device: torch.device,
    progress: str | None = None,
) -> Quality:
    """Reconstruct the central clip of every video from its k most important tokens. Collective."""
    outputs = outputs_of(
        lambda batch: measured(reconstruct(batch), batch.clips),
        shards,
        recipe,
        views=(1, 1),
        batch=recipe.evaluation.batch,
        num_workers=num_workers,
        device=device,
        progress=progress,
    )
    values = outputs.values[outputs.valid]
    if not len(values):
        return Quality(math.nan, math.nan, math.nan, 0, 0, len(outputs.skipped))
    psnr, ssim, codes = values[:, 0], values[:, 1], values[:, 2:]
    different = len(codes.unique())
    return Quality(
        psnr_db=float(psnr.mean()),
        ssim=float(ssim.mean()),
        code_usage=different / min(recipe.tokenizer.num_codes, codes.numel()),
        different_codes=different,
        videos=len(values),
        unreadable=len(outputs.skipped),
    )


def measured(made: Reconstruction, clips: Tensor) -> Tensor:
    """PSNR, SSIM and codes of each clip: B x (2 + N), float32; codes are exact."""
    with needs_extra("tokenizer"):
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

    target, pixels = unit_pixels(clips), made.pixels.clamp(0, 1)
    psnr = peak_signal_noise_ratio(
        pixels, target, data_range=1.0, dim=(1, 2, 3, 4), reduction="none"
    )
    ssim = structural_similarity_index_measure(
        *(rearrange(part, "b t h w c -> (b t) c h w") for part in (pixels, target)),
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(ssim, Tensor)
    per_clip = ssim.unflatten(0, (len(clips), -1)).mean(dim=1)
    return torch.cat([torch.stack([psnr, per_clip], dim=1), made.codes.flatten(1).float()], dim=1)


@dataclass(frozen=True)
class ObjectShare:
    """Share of the moving shape's tokens among the most important ones, and among all."""

    chosen: float
    all: float
    # Their ratio.
    times_random: float


def object_share(tokenizer: Tokenizer, recipe: TokenizerRecipe, *, videos: int) -> ObjectShare:
    """Share of the moving shape among the `BUDGET` most important tokens of the motion set.

    A token is the shape's where the shape covers at least half of its cube. videos: number of test
    videos.
    """
    hits = chosen = covered = tokens = 0
    for number in range(videos):
        clip, cover = motion_clip(recipe, number)
        scores, _ = tokenizer.tokens(clip[None])
        of_shape = to_cubes(cover[None], tokenizer.patch)[0].float().mean(dim=1) >= 0.5
        best = scores.flatten().topk(num_kept(BUDGET, scores.numel())).indices.cpu()
        hits += int(of_shape[best].sum())
        chosen += len(best)
        covered += int(of_shape.sum())
        tokens += len(of_shape)
    of_chosen, of_all = hits / chosen, covered / tokens
    return ObjectShare(of_chosen, of_all, of_chosen / of_all)


def motion_clip(recipe: TokenizerRecipe, number: int) -> tuple[Tensor, Tensor]:
    """The evaluation clip of a test video of the motion set, T H W 3 uint8, and its cover, 0..1."""
    frames, cover = scene("test", number)
    data = recipe.data
    stride = data.stride_at(float(DEMO.rate))
    if (room := len(frames) - math.ceil(data.frames * stride)) < 0:
        raise UserError(
            f"the motion set's videos have {len(frames)} frames, fewer than the "
            f"{math.ceil(data.frames * stride)} of the recipe's clips (data.frames x data.stride)."
        )
    shown = np.minimum(room // 2 + nearest(stride * np.arange(data.frames)), len(frames) - 1)
    crop = view_crop(frames.shape[1], frames.shape[2], data.size)
    pair = [
        cut(part[shown], crop, data.size, flip=False)
        for part in (frames, (255 * cover).round().astype("uint8").repeat(3, axis=-1))
    ]
    return pair[0], unit_pixels(pair[1])


def untrained(recipe: TokenizerRecipe) -> Tokenizer:
    """The tokenizer with the run's initial weights."""
    torch.manual_seed(recipe.train.seed)
    return Tokenizer(recipe.patch, recipe.tokenizer).eval()


@torch.inference_mode()
def judge_run(tokenizer: Tokenizer, shards: ShardSet, recipe: TokenizerRecipe) -> Quality:
    """`judge` for a trained tokenizer, on this machine's GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = tokenizer.to(device)
    quality = judge(
        lambda batch: moved(batch.clips),
        shards,
        recipe,
        num_workers=worker_count(recipe, cores=len(available_cores())),
        device=device,
        progress="reconstruct",
    )
    tokenizer.cpu()
    return quality


@torch.inference_mode()
def picture_rows(tokenizer: Tokenizer, clip: Tensor) -> list[tuple[str, np.ndarray, None]]:
    """Rows for `draw_rows` of a clip T H W 3 (uint8); importance is 1 where it is largest."""
    from arvideo_ds.evaluation.pictures import BLANK  # matplotlib

    made = tokenizer(clip[None])
    scores, _ = tokenizer.tokens(clip[None])
    original = unit_pixels(clip)

    def spread(tokens: Tensor) -> Tensor:
        pt, ph, pw = tokenizer.patch
        return repeat(tokens, "t h w -> (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    kept = spread(made.kept[0])[..., None]
    pictures = {
        "original": original,
        "reconstruction": made.pixels[0].clamp(0, 1),
        "tokens kept": original * kept + BLANK * (1 - kept),
        "importance": spread(scores[0] / scores.max()),
    }
    return [(label, np.asarray(picture), None) for label, picture in pictures.items()]
