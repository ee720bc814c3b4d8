"""The table of formats; a plugin may register more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from arvideo_ds.registry import Registry

if TYPE_CHECKING:
    from arvideo_ds.exports.opened import Opened
    from arvideo_ds.exports.source import Source

# Write the model into a folder and open it from there.
FORMATS: Registry[Callable[[Source, Path], Opened]] = Registry(
    "format",
    {
        "encoder": "arvideo_ds.exports.own:export",
        "huggingface": "arvideo_ds.exports.huggingface:export",
        "onnx": "arvideo_ds.exports.onnx_graph:export",
        "timm": "arvideo_ds.exports.timm_vit:export",
    },
)
# How model hubs write a licence that is not in their list, or not chosen.
UNSPECIFIED = "other"
