"""Whole weights out of a checkpoint of any ZeRO stage and number of ranks; one process does it."""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.engine.checkpoints import require_sound
from arvideo_ds.engine.saved_state import SavedState
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import replacing
from arvideo_ds.files.tensors import save_tensors


def export_weights(checkpoint: Path, path: Path, *, prefix: str, kind: str = "weight") -> None:
    """Write the fp32 weights below `prefix` as safetensors; `path` appears when it is whole.

    kind: "weight", or "average" for their moving average. Errors: `UserError` where the
    checkpoint is damaged, or holds no such weights.
    """
    require_sound(checkpoint)
    weights = SavedState(checkpoint).weights(prefix, kind)
    if not weights:
        raise UserError(f"checkpoint {checkpoint} holds no weights named {prefix}*.")
    with replacing(path) as partial:
        save_tensors(weights, partial)
