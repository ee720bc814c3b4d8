"""The form of a model: all of it that follows from the shape of its clips, and no weights.

A run whose phases have clips of different shapes trains one module: DeepSpeed, the optimiser and
checkpoints keep its parameters, and a new phase gives it the form of a module built for its clips.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from arvideo_ds.errors import UserError

_INTERNALS = frozenset(vars(nn.Module()))


class Form:
    """Of every submodule: the buffers that no checkpoint has, and attributes such as a grid."""

    def __init__(self, module: nn.Module) -> None:
        self._shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        self._attributes = {name: _attributes(part) for name, part in module.named_modules()}
        self._buffers = {name: _computed_buffers(part) for name, part in module.named_modules()}

    def require_parameters_of(self, other: Form, what: str) -> None:
        """Errors: `UserError` where weights differ in name or shape; what: changes them."""
        if changed := sorted(self._shapes.items() ^ other._shapes.items()):
            raise UserError(
                f"{what} changes {len(changed)} weights of the model, such as {changed[0][0]}; all "
                "phases train the same ones. Use positions that are computed from the grid, and "
                "the same model.patch and outputs in all phases."
            )

    def give_to(self, module: nn.Module) -> None:
        """Change a module of this form's structure, in place; its weights stay."""
        for name, part in module.named_modules():
            vars(part).update(self._attributes[name])
            for key, buffer in self._buffers[name].items():
                old = part._buffers[key]
                # Engines differ in whether they cast buffers.
                moved = buffer is not None and old is not None
                part._buffers[key] = buffer.to(old.device, old.dtype) if moved else buffer


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Without functions: what an engine puts around the module's own methods stays."""
    own = vars(part).items()
    return {k: v for k, v in own if k not in _INTERNALS and not callable(v)}


def _computed_buffers(part: nn.Module) -> dict[str, Any]:
    return {key: part._buffers[key] for key in sorted(part._non_persistent_buffers_set)}
