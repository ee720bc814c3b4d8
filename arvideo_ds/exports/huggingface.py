"""A folder that transformers opens: VideoMAEModel, or VideoMAEForVideoClassification.

VideoMAE's encoder is ours, with two exceptions. Its positions are the table of sincos_1d over the
grid, computed and not stored; others cannot be said. Its classifier's norm has an epsilon of 1e-5
where ours has 1e-6, which changes logits by some millionths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvideo_ds.errors import UserError, needs_extra
from arvideo_ds.exports.opened import Opened, save_weights, versions
from arvideo_ds.exports.source import Outputs, Source
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD
from arvideo_ds.models.encoder import NORM_EPSILON
from arvideo_ds.models.layouts import to_huggingface
from arvideo_ds.models.positions import sincos_1d


def export(source: Source, folder: Path) -> Opened:
    """Errors: `UserError` without transformers, and for what VideoMAE does not have."""
    transformers = _transformers()
    _require_its_positions(source)
    _require_its_head(source)
    name = "VideoMAEModel" if source.labels is None else "VideoMAEForVideoClassification"
    _config(source, transformers, name).save_pretrained(folder)
    _processor(source, transformers).save_pretrained(folder)
    save_weights(_state(source), folder / "model.safetensors")
    model = _open(getattr(transformers, name), folder)
    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    size = source.recipe.data.size
    return Opened(
        run=lambda clips: _run(model, processor, clips),
        how_to=(
            f"from transformers import {name}, VideoMAEImageProcessor\n"
            f'model = {name}.from_pretrained("FOLDER")\n'
            'inputs = VideoMAEImageProcessor.from_pretrained("FOLDER")(frames, return_tensors="pt")'
        ),
        versions=versions("transformers"),
        remarks=[
            f"`frames` are {source.recipe.data.frames} images of one clip; which of a video's "
            f"frames they were in training: {_sampling(source)}.",
            "The key bias of the attention is left out: it cancels in the softmax.",
        ]
        + ([] if size[0] == size[1] else ["The processor squeezes frames to the clip's shape."])
        + ([] if source.labels is None else [_pipeline(source)]),
        tags={
            "library_name": "transformers",
            "pipeline_tag": "feature-extraction"
            if source.labels is None
            else "video-classification",
        },
    )


def _transformers() -> Any:
    with needs_extra("export"):
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _require_its_positions(source: Source) -> None:
    table = sincos_1d(source.recipe.geometry.grid, source.recipe.size.width)
    if not torch.equal(source.encoder.positions.cpu(), table):
        raise UserError(
            "transformers' VideoMAE has one table of positions, computed as model.positions="
            f"sincos_1d over the clip's grid; this run has another ({source.recipe.model.positions}"
            ", or interpolated from another grid), so its weights would mean nothing there. Use "
            "--format encoder, onnx or timm, or pretrain with model.positions=sincos_1d."
        )


def _require_its_head(source: Source) -> None:
    if source.recipe.pooling == "attention":
        raise UserError(
            "transformers' VideoMAEForVideoClassification classifies the mean of the tokens, and "
            "has no class-attention layer (finetune.pooling=attention). Use --format encoder, onnx "
            "or timm."
        )
    if isinstance(source.labels, Mapping):
        raise UserError(
            "transformers' VideoMAEForVideoClassification has one label for a video, and this run "
            f"has several (finetune.heads: {', '.join(source.labels)}). Use --format encoder, onnx "
            "or timm."
        )


def _config(source: Source, transformers: Any, architecture: str) -> Any:
    recipe, size = source.recipe, source.recipe.size
    (tubelet, *patch), labels = recipe.patch, source.labels
    named = {} if labels is None else {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }  # fmt: skip
    return transformers.VideoMAEConfig(
        architectures=[architecture],
        image_size=_square(recipe.data.size),
        patch_size=_square(patch),
        num_frames=recipe.data.frames,
        tubelet_size=tubelet,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
        layer_norm_eps=NORM_EPSILON,
        qkv_bias=True,
        # With it the encoder has no norm of its own: the pooled token is normalised.
        use_mean_pooling=labels is not None,
        **named,
    )


def _processor(source: Source, transformers: Any) -> Any:
    """Resizes the shorter side and cuts the centre, as our test view does."""
    height, width = source.recipe.data.size
    square = height == width
    return transformers.VideoMAEImageProcessor(
        size={"shortest_edge": height} if square else {"height": height, "width": width},
        do_center_crop=square,
        crop_size={"height": height, "width": width},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )


def _state(source: Source) -> dict[str, Tensor]:
    state = to_huggingface(source.encoder.state_dict(), source.recipe.patch)
    if not isinstance(source.model, Classifier):
        return state
    out = {f"videomae.{name}": value for name, value in state.items()}
    for ours, theirs in (("norm", "fc_norm"), ("head", "classifier")):
        part = getattr(source.model, ours)
        out |= {f"{theirs}.{name}": value for name, value in part.state_dict().items()}
    return out


def _open(architecture: Any, folder: Path) -> Any:
    """As its users will; every tensor must find its place."""
    model, info = architecture.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise UserError(f"transformers does not find its way in the exported weights: {wrong}")
    return model.eval()


@torch.no_grad()
def _run(model: Any, processor: Any, clips: Tensor) -> Outputs:
    pixels = processor([list(clip.numpy()) for clip in clips], return_tensors="pt")["pixel_values"]
    tokens = getattr(model, "videomae", model)(pixels).last_hidden_state
    out = {"tokens": tokens, "features": tokens.mean(1)}
    if hasattr(model, "classifier"):
        out["logits"] = model(pixels).logits
    return out


def _pipeline(source: Source) -> str:
    """How transformers' pipeline samples, read in its code at 5.23, beside our evaluation."""
    data, recipe = source.recipe.data, source.recipe
    temporal, spatial = recipe.test_views
    views = f"{temporal} x {spatial} views (clips along time x crops), averaged after softmax"
    if recipe.test_views == (1, 1):
        views = "one central clip"
    short = (
        "takes frames twice"
        if data.sampling == "uniform"
        else "lowers the stride, and repeats the last frame where that does not suffice"
    )
    return (
        "## With the pipeline\n\n"
        "```python\n"
        "from transformers import pipeline\n"
        'print(pipeline("video-classification", model="FOLDER")("video.mp4"))\n'
        "```\n\n"
        "It needs `av` and `torchcodec`, and torchcodec FFmpeg's libraries; `pip install -e "
        "'.[export]'` of arvideo_ds brings the first two. It samples another clip than the one "
        "that the results below were measured with:\n\n"
        f"- transformers 5.23: {data.frames} frames spread over the whole video, frame floor(i x n "
        f"/ {data.frames}) of n; `frame_sampling_rate` has no effect. Versions that have no video "
        f"processor for VideoMAE: the first {data.frames} frames, or every k-th of the first with "
        "`frame_sampling_rate=k`.\n"
        f"- The evaluation of arvideo_ds: {_sampling(source)}, {views}.\n"
        f"- A video of fewer than {data.frames} frames is an error of the pipeline; arvideo_ds "
        f"{short}.\n\n"
        "For the evaluation's clip, decode its frames and open the model as above."
    )


def _sampling(source: Source) -> str:
    data = source.recipe.data
    if data.sampling == "uniform":
        return f"one of each of {data.frames} equal segments"
    return f"every {data.stride}th" if data.stride > 1 else "consecutive ones"


def _square(sides: Any) -> int | list[int]:
    return int(sides[0]) if sides[0] == sides[1] else [int(side) for side in sides]
