"""Trained models in Python; `import arvideo_ds` exports this module lazily.

B clips, T H W frames and pixels, N tokens on a grid t h w, D width, W windows of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from arvideo_ds.config import EncoderRecipe, FinetuneRecipe
from arvideo_ds.data.windows import Windows, read_windows
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.extraction import FEATURES, window_shape
from arvideo_ds.evaluation.predictions import central_clip, top_labels
from arvideo_ds.evaluation.public import PublicOptions
from arvideo_ds.exports.source import open_model
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.encoder import Encoder, encode_clips
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.ingest import open_source
from arvideo_ds.shards.manifest import ClassNames


class VideoModel(nn.Module):
    """A trained model. recipe: of its run. clip_shape: T H W, frames `recipe.data.stride` (or
    1 / `recipe.data.fps` seconds) apart."""

    def __init__(self, recipe: EncoderRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.clip_shape = recipe.geometry.clip

    def clip(self, video: str | Path) -> Tensor:
        """The central clip of a video file, T H W 3, uint8. Errors: `UserError`."""
        return central_clip(Path(video), self.recipe.data)

    def check_clips(self, clips: Tensor) -> None:
        """Errors: `UserError` for clips that are not B T H W 3 of `clip_shape`."""
        expected, shape = (*self.clip_shape, 3), tuple(clips.shape)
        if len(shape) != 5 or shape[1:] != expected:
            raise UserError(f"expected clips of shape {('B', *expected)}, but got {shape}.")


class VideoEncoder(VideoModel):
    """An encoder. grid: t h w, its tokens; width: D."""

    def __init__(self, encoder: Encoder, recipe: EncoderRecipe) -> None:
        super().__init__(recipe)
        self.encoder = encoder
        self.grid = recipe.geometry.grid
        self.width = encoder.embed.out_features

    def forward(self, clips: Tensor) -> Tensor:
        """Tokens B N D of clips B T H W 3, uint8 or floating 0..1, ordered by time, row, column.
        Errors: `UserError` for another shape."""
        self.check_clips(clips)
        return encode_clips(self.encoder, clips, self.recipe.patch)


class VideoClassifier(VideoModel):
    """A fine-tuned classifier. labels: class names in the order of its logits; by label set if it
    has several."""

    def __init__(self, classifier: Classifier, labels: ClassNames, recipe: EncoderRecipe) -> None:
        super().__init__(recipe)
        self.classifier, self.labels = classifier, labels

    def forward(self, clips: Tensor) -> Tensor:
        """Logits B x classes of clips B T H W 3, uint8 or floating 0..1. Errors: `UserError`."""
        self.check_clips(clips)
        logits: Tensor = self.classifier(clips)
        return logits

    def predict(self, video: str | Path, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest labels of a video file's central clip with their probabilities, best first.
        Errors: `UserError` for a file that does not decode."""
        return top_labels(self.classifier, self.labels, self.clip(video), top)


def load_encoder(
    run: str | Path, weights: str | None = None, *, overrides: Sequence[str] = ()
) -> VideoEncoder:
    """The encoder of a finished run, of its export with --format encoder, or of a public classifier
    (docs/exporting.md).

    run: the folder, or a public model's file. weights: "best", "last" or "ema"; default: best if
    the run has it. overrides: settings of a public model, such as "data.stride=2". The encoder is
    on the CPU, in evaluation mode; one fine-tuned on averaged tokens has no last norm. Errors:
    `UserError` if recipe or weights are missing or do not fit.
    """
    public = PublicOptions(overrides=overrides)
    source = open_model(Path(run), weights=_known(weights), public=public, needs_labels=False)
    return VideoEncoder(source.encoder, source.recipe).eval()


def load_classifier(
    run: str | Path,
    weights: str | None = None,
    *,
    labels: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> VideoClassifier:
    """The classifier of a fine-tuned run, of its export with --format encoder, or of a public
    model. labels: file of the class names of a public model, which a .pth does not have. Other
    arguments, device, mode and errors: as `load_encoder`."""
    public = PublicOptions(None if labels is None else Path(labels), overrides)
    source = open_model(Path(run), FinetuneRecipe, weights=_known(weights), public=public)
    return VideoClassifier(source.classifier, source.class_names, source.recipe).eval()


@torch.no_grad()
def encode(
    encoder: VideoEncoder,
    video: str | Path | Tensor,
    *,
    features: str = "clip",
    hop: int | None = None,
    batch: int = 16,
) -> Tensor:
    """Features of a video as in `arvideo features`, float32 on the CPU.

    video: a file of any length, as W windows of the encoder's clips; or clips W T H W 3, uint8 or
    floating 0..1. features: "clip", the mean of each window's tokens, W D; "time", a mean per time,
    W t D; "token", all tokens, W N D. hop: frames between windows (at data.fps, if
    given); default: adjacent windows. batch: windows per forward pass, on the encoder's device.
    Errors: `UserError` for other values, clips of another shape, and a file that does not decode.
    """
    if features not in FEATURES:
        raise UserError(f"features={features!r} must be one of: {', '.join(FEATURES)}.")
    if batch < 1:
        raise UserError(f"batch={batch} must be 1 or more.")
    if isinstance(video, Tensor):
        encoder.check_clips(video)
        groups: Iterator[Tensor] = iter(video.split(batch))
    else:
        groups = _windows(encoder.recipe, Path(video), hop, batch)
    device = next(encoder.parameters()).device
    pool, times = FEATURES[features], encoder.grid[0]
    return torch.cat([pool(encoder(clips.to(device)).float(), times).cpu() for clips in groups])


def _windows(recipe: EncoderRecipe, path: Path, hop: int | None, batch: int) -> Iterator[Tensor]:
    shape = window_shape(recipe, hop)
    try:
        with open_source(path) as source:
            for clips in read_windows(source, None, shape, batch=batch):
                if not isinstance(clips, Windows):
                    yield torch.from_numpy(clips)
    except RejectedError as error:
        raise UserError(f"cannot decode {path}: {error}.") from None


def _known(weights: str | None) -> str | None:
    if weights not in (None, *run_folder.WEIGHTS):
        raise UserError(f"weights={weights!r} must be one of: {', '.join(run_folder.WEIGHTS)}.")
    return weights
