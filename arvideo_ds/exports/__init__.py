"""Trained models for other programs: folders that open without this package.

Owns the formats (a module each), the comparison of an export with its run, and the model card. Must
not know DeepSpeed or how a run was trained: it reads a run's recipe, weights and records. Other
programs' libraries are imported where they are used.
"""

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
        "encoder": "arvideo_ds.exports.source:export_encoder",
        "huggingface": "arvideo_ds.exports.huggingface:export",
        "onnx": "arvideo_ds.exports.onnx_graph:export",
        "timm": "arvideo_ds.exports.timm_vit:export",
    },
)
# Model hubs' name of a licence that is not in their list, or not chosen.
UNSPECIFIED = "other"
