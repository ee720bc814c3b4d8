"""Read a file of weights of any program as tensors by name, without running code in it."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from arvideo_ds.errors import UserError
from arvideo_ds.files.tensors import load_tensors

State = dict[str, Tensor]
# A folder's file of weights: ours and Hugging Face's, then Hugging Face's older name.
WEIGHTS_IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")
_PICKLED = (".pth", ".pt", ".bin")
# Keys under which training programs save weights; the first that exists counts.
_NESTS = ("model", "module", "state_dict")
# Prefixes that wrappers add to every name.
_WRAPPED = re.compile(r"^((module|model|backbone)\.)+")
_COMPILED = "_orig_mod."
# How torch names an object that `weights_only` refuses.
_FOREIGN = re.compile(r"GLOBAL (\S+)")


def read_weights(path: Path) -> State:
    """Tensors by name, on the CPU; prefixes of wrappers are removed.

    path: .safetensors; .pth, .pt or .bin of torch, read with `weights_only` (which here also allows
    `argparse.Namespace`, part of VideoMAE's files); or a folder with model.safetensors or
    pytorch_model.bin. Nothing is downloaded.
    Errors: `UserError` for a file that is missing, damaged, has code or has no weights.
    """
    file = weights_file(path)
    tree = _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickled(file)
    state = {
        _WRAPPED.sub("", name.replace(_COMPILED, "")): value
        for name, value in _unnested(tree).items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise UserError(f"{file} has no weights by name; it is not a model's state.")
    return state


def load_state(module: nn.Module, state: State, wrong: str, *, assign: bool = False) -> None:
    """Load all weights of a module; `assign` as in PyTorch.

    Errors: `UserError` with `wrong` and the first name or shape that differs.
    """
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{wrong}: {first}") from None


def weights_file(path: Path) -> Path:
    """The file of weights that a path names. Errors: `UserError` as `read_weights`."""
    if path.is_dir():
        return _file_in(path)
    if not path.exists():
        raise UserError(
            f"there is no {path}. Give a file of weights (.safetensors{', '.join(('', *_PICKLED))})"
            ", or the folder of a finished run or of a Hugging Face model. Nothing is downloaded: "
            "download a model of a hub to a folder first."
        )
    if path.suffix not in (".safetensors", *_PICKLED):
        raise UserError(
            f"{path} is not a file of weights: its name must end in .safetensors, "
            f"{' or '.join(_PICKLED)}."
        )
    return path


def _file_in(folder: Path) -> Path:
    for name in WEIGHTS_IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    if any((folder / f"{name}.index.json").is_file() for name in WEIGHTS_IN_A_FOLDER):
        raise UserError(
            f"{folder} has weights in several parts. Open it with transformers and save it whole:"
            " model.save_pretrained(FOLDER, max_shard_size='100GB')."
        )
    if (folder / "recipe.yaml").is_file():
        raise UserError(
            f"the run in {folder} is not finished: {WEIGHTS_IN_A_FOLDER[0]} is written at its end. "
            "Continue the run first."
        )
    raise UserError(
        f"{folder} has neither {' nor '.join(WEIGHTS_IN_A_FOLDER)}. Give a file of weights, or the "
        "folder of a finished run or of a Hugging Face model."
    )


def _load_safetensors(file: Path) -> Mapping[str, Any]:
    try:
        return load_tensors(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); copy or download it again.") from None


def _load_pickled(file: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip raise many kinds
        foreign = _FOREIGN.search(str(error))
        if foreign is None:
            why = str(error).strip().partition("\n")[0].partition(". ")[0] or "it is truncated"
            why = why if type(error) is not pickle.UnpicklingError else "torch did not write it"
            raise UserError(f"{file} is damaged ({why}); copy or download it again.") from None
        raise UserError(
            f"{file} was not loaded: it has a Python object ({foreign[1]}), and loading that could "
            "run code. If you trust its source, load it there and save only the weights: "
            "torch.save(model.state_dict(), FILE)."
        ) from None


def _unnested(tree: Any) -> Mapping[str, Any]:
    """The innermost mapping of names to tensors."""
    while isinstance(tree, Mapping):
        inside = [tree[nest] for nest in _NESTS if isinstance(tree.get(nest), Mapping)]
        if not inside:
            return {str(name): value for name, value in tree.items()}
        tree = inside[0]
    return {}
