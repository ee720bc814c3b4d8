"""Features of videos of any length: windows -> the frozen encoder -> one file per video.

The same command resumes after the finished videos and tries rejected ones again. A batch has
windows of one video, so a file depends on its video and the settings alone, not on interruptions or
on other videos.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.data.windows import Windows, WindowShape, windows_of
from arvideo_ds.decoding.processes import Failed, Finished, stream_all
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.feature_files import require_format
from arvideo_ds.evaluation.feature_folder import FeatureFolder
from arvideo_ds.evaluation.features import by_time, mean
from arvideo_ds.evaluation.pretrained import load_classifier, load_trained_encoder
from arvideo_ds.evaluation.public import PublicClassifier
from arvideo_ds.files.atomic import explained_when_full
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.models.encoder import Encoder, encode_clips
from arvideo_ds.shards.inputs import Video, VideoList
from arvideo_ds.shards.manifest import REJECTS
from arvideo_ds.version import git_commit

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VERSION = 1

# Tokens B (t s) D of windows -> B D, B (t s) D, B t D.
FEATURES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clip": mean,
    "token": lambda tokens, _: tokens,
    "time": by_time,
}


@dataclass(frozen=True)
class ExtractionJob:
    """Options of `extract_features`.

    hop: frames between windows (at data.fps, if given), None for windows that touch. batch: windows
    per forward pass. workers: decoding processes. timeout_s: longest time for one batch of one
    video.
    """

    listing: VideoList
    output: Path
    features: str = "clip"
    format: str = "npz"
    hop: int | None = None
    batch: int = 16
    precision: str = "fp32"
    workers: int = 0
    timeout_s: float = 120.0


@dataclass(frozen=True)
class ExtractionReport:
    """Counts over all runs in the folder; `new` are the videos of this run."""

    videos: int
    new: int
    windows: int
    seconds: float
    rejects: dict[str, int]
    interrupted: bool


def extract_features(
    recipe: EncoderRecipe,
    weights: Path,
    job: ExtractionJob,
    device: torch.device,
    *,
    stop: Callable[[], bool] = lambda: False,
    public: PublicClassifier | None = None,
) -> ExtractionReport:
    """Write the features of every video of the job that is not done yet.

    stop: once it returns True, started videos are finished and no other is started. public: the
    model of these weights, unless it is a run. Errors: `UserError` when the folder contains
    features of other settings, the disk or the GPU's memory is full, or no video is usable.
    """
    require_format(job.format)
    shape = window_shape(recipe, job.hop)
    loaded = load_encoder(recipe, weights) if public is None else public.model.encoder
    encoder, config = loaded.to(device), _config(recipe, weights, job, shape)
    if public is not None:
        config["settings"]["public"] = public.facts()["settings"]
    folder = FeatureFolder(job.output, config, job.listing, kind=job.format)
    pending = [video for video in job.listing.videos if video.key not in folder.done]
    items = stream_all(
        functools.partial(windows_of, shape, job.batch),
        pending,
        workers=min(job.workers, len(pending)),
        timeout_s=job.timeout_s,
        stop=stop,
    )
    encode = functools.partial(_encode, encoder, recipe, job, device)
    try:
        with explained_when_full(job.output, "with the videos that are not done"), folder:
            _collect(folder, items, encode, total=len(job.listing.videos))
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory is too small for --batch {job.batch} windows of {shape.frames} "
            "frames; halve --batch."
        ) from None
    return _report(folder, job, pending)


def load_encoder(recipe: EncoderRecipe, weights: Path) -> Encoder:
    """The encoder of a run. Errors: `UserError` when the weights are missing or do not fit."""
    if recipe.learns_labels:
        return load_classifier(recipe, weights.parent, weights.name)[0].encoder
    return load_trained_encoder(recipe, weights)


def window_shape(recipe: EncoderRecipe, hop: int | None) -> WindowShape:
    """Windows as the recipe's clips. Errors: `UserError` for a hop below 1."""
    data = recipe.data
    if hop is not None and hop < 1:
        raise UserError(f"--hop {hop} must be at least one frame.")
    stride = data.stride or 1  # at data.fps
    return WindowShape(
        frames=data.frames,
        stride=stride,
        hop=hop or data.frames * stride,
        size=data.size,
        sampling=data.sampling,
        fps=data.fps,
        test_short_side=data.test_short_side,
    )


def _config(
    recipe: EncoderRecipe, weights: Path, job: ExtractionJob, shape: WindowShape
) -> dict[str, Any]:
    """Contents of config.json; `settings` decide the features and are the same for all videos."""
    settings = {
        "version": _VERSION,
        "input": job.listing.identity,
        "weights_sha256": sha256_of(weights),
        "features": job.features,
        "format": job.format,
        "precision": job.precision,
        # Without the setting that is not used: folders of earlier versions go on.
        **{name: value for name, value in asdict(shape).items() if value is not None},
    }
    return {"settings": settings, "commit": git_commit(), "recipe": recipe.model_dump(mode="json")}


@torch.no_grad()
def _encode(
    encoder: Encoder,
    recipe: EncoderRecipe,
    job: ExtractionJob,
    device: torch.device,
    clips: np.ndarray,
) -> Tensor:
    """Clips B F h w 3 -> features B ..., float32."""
    moved = torch.from_numpy(clips).to(device)
    dtype = PRECISIONS[job.precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        tokens = encode_clips(encoder, moved, recipe.patch)
    return FEATURES[job.features](tokens.float(), recipe.data.frames // recipe.patch[0])


def _collect(
    folder: FeatureFolder,
    items: Iterable[tuple[Video, Any]],
    encode: Callable[[np.ndarray], Tensor],
    *,
    total: int,
) -> None:
    """Encode and write what the decoders deliver."""
    windows = 0
    # miniters=0: a long video updates its windows as they come.
    initial = len(folder.done)
    with tqdm(desc="features", unit="video", total=total, initial=initial, miniters=0) as bar:
        for video, item in items:
            if isinstance(item, np.ndarray):
                folder.append(video, encode(item))
                windows += len(item)
                bar.set_postfix(windows=windows, refresh=False)
            elif isinstance(item, Windows):
                folder.finish(video, item)
            elif isinstance(item, Failed):
                folder.reject(video, item.reason, item.message)
                tqdm.write(f"rejected: {video.key!r}: {item.reason} ({item.message})")
            bar.update(isinstance(item, Finished | Failed))


def _report(folder: FeatureFolder, job: ExtractionJob, pending: list[Video]) -> ExtractionReport:
    reasons = dict(Counter(reject.reason for reject in folder.rejects).most_common())
    new = sum(video.key in folder.done for video in pending)
    rejected = len(folder.rejects) - len(job.listing.rejects)
    interrupted = new + rejected < len(pending)
    if not folder.done and not interrupted:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(
            f"none of the {len(job.listing.videos)} videos is usable ({listed}); see "
            f"{job.output / REJECTS} for the reasons."
        )
    lines = folder.done.values()
    return ExtractionReport(
        videos=len(lines),
        new=new,
        windows=sum(line["windows"] for line in lines),
        seconds=sum(line["frames"] / line["fps"] for line in lines),
        rejects=reasons,
        interrupted=interrupted,
    )
