"""The table of formats; a plugin may register more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from arvideo_ds.registry import Registry

if TYPE_CHECKING:
    from arvideo_ds.exports.source import ExportSource, OpenedExport

# Write the model into a folder and open it from there.
FORMATS: Registry[Callable[[ExportSource, Path], OpenedExport]] = Registry(
    "format",
    {
        "encoder": "arvideo_ds.exports.native:export",
        "huggingface": "arvideo_ds.exports.huggingface:export",
        "onnx": "arvideo_ds.exports.onnx_graph:export",
        "timm": "arvideo_ds.exports.timm_vit:export",
    },
)
# Model hubs' name of a licence that is not in their list, or not chosen.
UNSPECIFIED = "other"
