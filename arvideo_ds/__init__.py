"""arvideo_ds: ARVideo and its baselines, pretrained at scale with DeepSpeed.

In Python (docs/python.md); nothing is imported before it is used:

    encoder = arvideo_ds.load_encoder("runs/demo")
    features = arvideo_ds.encode(encoder, "clip.mp4")

Imports between the rooms go one way; pyproject.toml lists the layers, `make check` enforces them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arvideo_ds.api import VideoClassifier, VideoEncoder, encode, load_classifier, load_encoder
    from arvideo_ds.config import Recipe

__version__ = "0.1.0"
__all__ = [
    "VideoClassifier",
    "VideoEncoder",
    "encode",
    "load_classifier",
    "load_encoder",
    "load_recipe",
]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of any task by name or path, with `section.key=value` overrides; needs no torch.

    Errors: `UserError` (arvideo_ds.errors) that names file, key and remedy.
    """
    from arvideo_ds.config import Recipe, load_recipe

    return load_recipe(str(name_or_path), overrides, Recipe)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("arvideo_ds.api"), name)
    raise AttributeError(f"module 'arvideo_ds' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
