"""A folder that transformers opens: VideoMAEModel, or VideoMAEForVideoClassification.

VideoMAE's encoder is ours with two exceptions: its positions are always the table of sincos_1d over
the grid, and its classifier's norm has an epsilon of 1e-5 instead of 1e-6, which changes logits by
some millionths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvideo_ds.errors import UserError, needs_extra
from arvideo_ds.exports.source import ExportSource, OpenedExport, Outputs, save_weights, versions
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD
from arvideo_ds.models.encoder import NORM_EPSILON
from arvideo_ds.models.layouts import to_huggingface
from arvideo_ds.models.positions import sincos_1d

_USE_ANOTHER = "Use --format encoder, onnx or timm."


def export(source: ExportSource, folder: Path) -> OpenedExport:
    """Errors: `UserError` without transformers, and for what VideoMAE does not support."""
    with needs_extra("export"):
        import transformers
    transformers.utils.logging.disable_progress_bar()
    _require_supported(source)
    classifies = source.labels is not None
    name = "VideoMAEForVideoClassification" if classifies else "VideoMAEModel"
    _config(source, transformers, name).save_pretrained(folder)
    _processor(source, transformers).save_pretrained(folder)
    save_weights(_state(source), folder / "model.safetensors")
    model = _open(getattr(transformers, name), folder)
    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    data = source.recipe.data
    remarks = [
        f"`frames` are {data.frames} images of one clip; in training they were, of a video's "
        f"frames, {_sampling(source)}.",
        "The key bias of the attention is omitted: it cancels in the softmax.",
    ]
    if data.size[0] != data.size[1]:
        remarks.append("The processor resizes frames to the clip's shape without cropping.")
    if classifies:
        remarks.append(_pipeline(source))
    return OpenedExport(
        run=lambda clips: _run(model, processor, clips),
        how_to=(
            f"from transformers import {name}, VideoMAEImageProcessor\n"
            f'model = {name}.from_pretrained("FOLDER")\n'
            'inputs = VideoMAEImageProcessor.from_pretrained("FOLDER")(frames, return_tensors="pt")'
        ),
        versions=versions("transformers"),
        remarks=remarks,
        tags={
            "library_name": "transformers",
            "pipeline_tag": "video-classification" if classifies else "feature-extraction",
        },
    )


def _require_supported(source: ExportSource) -> None:
    table = sincos_1d(source.recipe.geometry.grid, source.recipe.size.width)
    if not torch.equal(source.encoder.positions.cpu(), table):
        raise UserError(
            "transformers' VideoMAE has one table of positions, computed as model.positions="
            f"sincos_1d over the clip's grid; this run has another ({source.recipe.model.positions}"
            f", or interpolated from another grid). {_USE_ANOTHER[:-1]}, or pretrain with "
            "model.positions=sincos_1d."
        )
    if (pooling := source.recipe.pooling) != "mean":
        use = _USE_ANOTHER if pooling == "attention" else "Use --format encoder or onnx."
        raise UserError(
            "transformers' VideoMAEForVideoClassification classifies the mean of the tokens; this "
            f"run has finetune.pooling={pooling}. {use}"
        )
    if isinstance(source.labels, Mapping):
        raise UserError(
            "transformers' VideoMAEForVideoClassification has one label for a video, and this run "
            f"has several (finetune.heads: {', '.join(source.labels)}). {_USE_ANOTHER}"
        )


def _config(source: ExportSource, transformers: Any, architecture: str) -> Any:
    recipe, size = source.recipe, source.recipe.size
    (tubelet, *patch), labels = recipe.patch, source.labels
    label_of = None if labels is None else dict(enumerate(labels))
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
        # Then the pooled token is normalised instead of the encoder's tokens.
        use_mean_pooling=labels is not None,
        id2label=label_of,
        label2id=None if label_of is None else {name: n for n, name in label_of.items()},
    )


def _processor(source: ExportSource, transformers: Any) -> Any:
    """Resizes the shorter side and crops the centre, as the test view does."""
    height, width = source.recipe.data.size
    square = height == width
    short_side = source.recipe.data.test_short_side or height
    return transformers.VideoMAEImageProcessor(
        size={"shortest_edge": short_side} if square else {"height": height, "width": width},
        do_center_crop=square,
        crop_size={"height": height, "width": width},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )


def _state(source: ExportSource) -> dict[str, Tensor]:
    state = to_huggingface(source.encoder.state_dict(), source.recipe.patch)
    if not isinstance(source.model, Classifier):
        return state
    out = {f"videomae.{name}": value for name, value in state.items()}
    for ours, theirs in (("norm", "fc_norm"), ("head", "classifier")):
        part = getattr(source.model, ours)
        out |= {f"{theirs}.{name}": value for name, value in part.state_dict().items()}
    return out


def _open(architecture: Any, folder: Path) -> Any:
    """Open the export as its users will, and check that every tensor is loaded."""
    model, info = architecture.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise UserError(f"transformers does not load all exported weights: {wrong}")
    return model.eval()


@torch.no_grad()
def _run(model: Any, processor: Any, clips: Tensor) -> Outputs:
    pixels = processor([list(clip.numpy()) for clip in clips], return_tensors="pt")["pixel_values"]
    tokens = getattr(model, "videomae", model)(pixels).last_hidden_state
    out = {"tokens": tokens, "features": tokens.mean(1)}
    if hasattr(model, "classifier"):
        out["logits"] = model(pixels).logits
    return out


def _pipeline(source: ExportSource) -> str:
    """Sampling of transformers' pipeline (5.23) and of our evaluation."""
    data, test_views = source.recipe.data, source.recipe.test_views
    temporal, spatial = test_views
    views = f"{temporal} x {spatial} views (clips along time x crops), averaged after softmax"
    if test_views == (1, 1):
        views = "one central clip"
    short = "lowers the stride, and repeats the last frame where that does not suffice"
    if data.sampling == "uniform":
        short = "takes frames twice"
    return (
        "## With the pipeline\n\n"
        "```python\n"
        "from transformers import pipeline\n"
        'print(pipeline("video-classification", model="FOLDER")("video.mp4"))\n'
        "```\n\n"
        "It needs `av` and `torchcodec`, and torchcodec FFmpeg's libraries; `pip install -e "
        "'.[export]'` of arvideo_ds installs the first two. It samples another clip than the one "
        "of the results below:\n\n"
        f"- transformers 5.23: {data.frames} frames spread over the whole video, frame floor(i x n "
        f"/ {data.frames}) of n; `frame_sampling_rate` has no effect. Versions that have no video "
        f"processor for VideoMAE: the first {data.frames} frames, or every k-th of the first with "
        "`frame_sampling_rate=k`.\n"
        f"- The evaluation of arvideo_ds: {_sampling(source)}, {views}.\n"
        f"- A video of fewer than {data.frames} frames is an error of the pipeline; arvideo_ds "
        f"{short}.\n\n"
        "For the evaluation's clip, decode its frames and open the model as above."
    )


def _sampling(source: ExportSource) -> str:
    data = source.recipe.data
    if data.sampling == "uniform":
        return f"one of each of {data.frames} equal segments"
    if data.fps is not None:
        return f"{data.fps:g} per second"
    return "consecutive ones" if data.stride == 1 else f"every {data.stride}th"


def _square(sides: Any) -> int | list[int]:
    return int(sides[0]) if sides[0] == sides[1] else [int(side) for side in sides]
