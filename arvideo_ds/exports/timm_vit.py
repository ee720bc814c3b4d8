"""The weights under the names of timm's VisionTransformer.

Only the patch embedding differs: timm's is a convolution over an image, ours over frames as well,
so patch_embed.proj.weight has five axes. `open_timm` opens timm's model with it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from arvideo_ds.errors import UserError
from arvideo_ds.exports.source import (
    ExportSource,
    OpenedExport,
    Outputs,
    architecture,
    logits_in_words,
    save_weights,
    versions,
)
from arvideo_ds.files.atomic import write_json
from arvideo_ds.files.tensors import load_tensors
from arvideo_ds.geometry import Triple
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.layouts import to_videomae

_FILE = "model.safetensors"
_POOLS = {"mean": "avg", "attention": "map"}


class CubeEmbed(nn.Module):
    """timm's patch embedding for clips: B 3 T H W to tokens B N D."""

    def __init__(self, *, patch: Triple, grid: Triple, embed_dim: int, **_of_images: Any) -> None:
        super().__init__()
        self.patch_size, self.grid_size, self.num_patches = patch, grid, math.prod(grid)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=patch, stride=patch)

    def forward(self, clips: Tensor) -> Tensor:
        return self.proj(clips).flatten(2).transpose(1, 2)


def open_timm(folder: str | Path) -> VisionTransformer:
    """timm's model of an exported folder, in evaluation mode.

    It takes clips B 3 T H W, pixels 0..1 normalised with `pixel_mean` and `pixel_std` of
    config.json; `forward_features` returns tokens B N D, a classifier's `forward` logits.
    """
    folder = Path(folder)
    facts = json.loads((folder / "config.json").read_text())
    classes = facts["classes"]
    model = VisionTransformer(
        img_size=facts["size"],
        patch_size=facts["patch"][1:],
        num_classes=classes or 0,
        # timm's "avg" has the norm after pooling, "map" before the class-attention layer.
        global_pool=_POOLS[facts.get("pooling", "mean")] if classes else "",
        embed_dim=facts["width"],
        depth=facts["depth"],
        num_heads=facts["heads"],
        mlp_ratio=facts["mlp"] / facts["width"],
        class_token=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=facts["norm_epsilon"]),
        embed_layer=functools.partial(
            CubeEmbed, patch=tuple(facts["patch"]), grid=tuple(facts["token_grid"])
        ),
    )
    model.load_state_dict(load_tensors(folder / _FILE))
    return model.eval()


def export(source: ExportSource, folder: Path) -> OpenedExport:
    if source.recipe.pooling not in _POOLS:
        raise UserError(
            f"timm's VisionTransformer has no pooling like finetune.pooling={source.recipe.pooling}"
            ". Use --format encoder or onnx."
        )
    save_weights(_state(source), folder / _FILE)
    facts = architecture(source)
    write_json(folder / "config.json", facts)
    model = open_timm(folder)
    mean, std = torch.tensor(facts["pixel_mean"]), torch.tensor(facts["pixel_std"])
    return OpenedExport(
        run=lambda clips: _run(model, ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)),
        how_to=(
            "from arvideo_ds.exports.timm_vit import open_timm\n"
            'model = open_timm("FOLDER")  # a timm VisionTransformer\n'
            "tokens = model.forward_features(pixels)  # B 3 T H W, normalised as in config.json"
        ),
        versions=versions("timm"),
        remarks=[
            "All names are timm's of VisionTransformer(class_token=False). Two shapes differ: "
            "patch_embed.proj.weight has five axes (cubes of frames, not patches of an image), and "
            "pos_embed one row for each token of all times. A timm model loads them with "
            "`CubeEmbed` of this module as its embed_layer; `open_timm` does that.",
            *logits_in_words(source),
        ],
    )


def _state(source: ExportSource) -> dict[str, Tensor]:
    ours = source.encoder.state_dict()
    embed = {name: ours.pop(name) for name in ("embed.weight", "embed.bias")}
    state = {**ours, **to_videomae(embed, source.recipe.patch)}
    state["pos_embed"] = source.encoder.positions[None]
    if isinstance(source.model, Classifier):
        parts = {"norm": "fc_norm", "head": "head", "class_attention": "attn_pool"}
        for name, value in source.model.state_dict().items():
            part, _, rest = name.partition(".")
            if part in parts:
                state[f"{parts[part]}.{rest}"] = value
    return state


@torch.no_grad()
def _run(model: VisionTransformer, pixels: Tensor) -> Outputs:
    tokens = model.forward_features(pixels)
    if not model.num_classes:
        return {"tokens": tokens, "features": tokens.mean(1)}
    logits = model.forward_head(tokens)
    return {"tokens": tokens, "features": model.pool(tokens), "logits": logits}
