"""Load an encoder's weights from any known layout, and give ours the names of other programs.

Layouts differ in names, in the patch embedding (a 3D convolution, or one matrix over a cube's
values) and in the attention's biases. VideoMAE has no key bias: it adds the same to all scores of
a query, which softmax ignores. So it is zero when loaded and dropped when exported.

D width, P values of a cube (frame, row, column, colour), pt ph pw its frames, rows and columns.
Source: the published files of VideoMAE and VideoMAE V2, and transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from arvideo_ds.config.sizes import SIZES
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import CHANNELS, Triple
from arvideo_ds.models.encoder import Encoder
from arvideo_ds.models.positions import sincos_1d
from arvideo_ds.models.weight_files import State, read_weights

_EMBED, _CONVOLUTION, _POSITIONS = "embed.weight", "patch_embed.proj.weight", "pos_embed"
_LISTED = 6


@dataclass(frozen=True)
class Layout:
    """Names of an encoder in a kind of file, recognised by its patch embedding below `prefix`."""

    name: str
    prefix: str
    embedding: str
    to_ours: Callable[[State], State]


@dataclass(frozen=True)
class KeyReport:
    """What happened to every tensor; `str` of it is a summary.

    loaded, missing: names of our encoder; missing tensors keep their values. unexpected: unused
    names of the file. outside: loaded names outside the encoder (`load_classifier_weights`).
    """

    path: Path
    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def match(self) -> float:
        """Share of the encoder's tensors that the file had."""
        return len(self.loaded) / (len(self.loaded) + len(self.missing))

    def __str__(self) -> str:
        whole = len(self.loaded) + len(self.missing)
        lines = [f"weights of {self.path} ({self.layout}): {len(self.loaded)} of {whole} tensors"]
        if self.outside:
            lines.append(f"  outside the encoder: {_listed(self.outside)}")
        if self.missing:
            lines.append(f"  not in the file, unchanged: {_listed(self.missing)}")
        if self.unexpected:
            lines.append(f"  in the file, not used: {_grouped(self.unexpected)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ClassifierShape:
    """What the tensors of a classifier tell of it. mlp: hidden width. patch: frames, rows, columns;
    None in layouts of this project, which do not show it. classes: None without a head."""

    width: int
    depth: int
    mlp: int
    patch: Triple | None
    classes: int | None


def classifier_shape(state: State, path: Path) -> ClassifierShape:
    """Errors: `UserError` for an unknown layout, a model of images, and an incomplete encoder."""
    layout = find_layout(state, path)
    inside = {n.removeprefix(layout.prefix): v for n, v in state.items()}
    kernel = tuple(inside[layout.embedding].shape[2:])
    _require_video_patch(kernel, None, path)
    ours = layout.to_ours(inside)
    width, depth = _shape(ours)
    if (hidden := ours.get("blocks.0.mlp.fc1.weight")) is None:
        raise UserError(f"{path} ({layout.name}) has no blocks; give the file of a whole model.")
    head = state.get(f"{_HEAD}weight", state.get("classifier.weight"))
    patch = (kernel[0], kernel[1], kernel[2]) if kernel else None
    return ClassifierShape(width, depth, len(hidden), patch, None if head is None else len(head))


def load_encoder(
    encoder: Encoder, path: str | Path, *, patch: Triple | None = None, min_match: float = 0.9
) -> KeyReport:
    """Load an encoder from a file or folder in any layout of `LAYOUTS`.

    patch: of the recipe, compared with the file's where both are known. min_match: least share of
    the encoder's tensors that the file must have. Positions are not loaded: they are computed from
    the clip's shape. Every rank loads the file itself. Errors: `UserError` for a file that cannot
    be read (`read_weights`), of an unknown layout, of another width, depth or patch, with learned
    positions, or with too few tensors; the encoder is then unchanged.
    """
    path = Path(path)
    return _load_encoder(encoder, read_weights(path), path, patch, min_match)


def load_classifier_weights(
    model: nn.Module,
    path: str | Path,
    *,
    patch: Triple | None = None,
    same_classes: bool | None = None,
    state: State | None = None,
) -> KeyReport:
    """Load the start of fine-tuning: the encoder, and the layers after it from a classifier's file.

    model: with `encoder` and `head`. From a classifier's file come its norm before the head (also
    VideoMAE's `fc_norm`) and its class attention where shapes match, and its head where shapes
    match unless same_classes is False (None: unknown). VideoMAE's code does the same
    (run_class_finetuning.py). state: the file's tensors, where they are read already. Errors: as
    `load_encoder`, with a min_match of 0.9.
    """
    path = Path(path)
    state = read_weights(path) if state is None else state
    encoder: Any = model.encoder
    report = _load_encoder(encoder, state, path, patch, min_match=0.9)
    # Without a prefix, `norm` is the encoder's last norm.
    inside = find_layout(state, path).prefix or "norm."
    theirs = {
        _renamed(n, _OTHER_NAMES): value for n, value in state.items() if not n.startswith(inside)
    }
    # Several heads of one encoder have other names.
    if not all(f"{_HEAD}weight" in state for state in (theirs, model.state_dict())):
        return report
    ours = {n: value for n, value in model.state_dict().items() if not n.startswith("encoder.")}
    fits = [n for n in ours if n in theirs and theirs[n].shape == ours[n].shape]
    head_fits = all(n in fits for n in ours if n.startswith(_HEAD))
    keeps_head = head_fits and same_classes is not False
    loaded = [n for n in fits if keeps_head or not n.startswith(_HEAD)]
    model.load_state_dict({n: theirs[n] for n in loaded}, strict=False)
    notes = [*report.notes, _head_note(theirs, ours, fits=head_fits, same_classes=same_classes)]
    if missing := [n for n in ours if n not in loaded and not n.startswith(_HEAD)]:
        notes.append(f"not in the file, newly initialised: {_listed(missing)} (it pools otherwise)")
    return dataclasses.replace(
        report,
        outside=tuple(loaded),
        unexpected=tuple(n for n in report.unexpected if _renamed(n, _OTHER_NAMES) not in loaded),
        notes=tuple(notes),
    )


def load_objective_weights(
    model: nn.Module, path: str | Path, *, patch: Triple | None = None, same_decoder: bool
) -> KeyReport:
    """Load the start of pretraining: the encoder, and all else from a run's file if it has all.

    model: with `encoder`. same_decoder: whether the file is of an objective and a decoder that
    equal the model's; otherwise all but the encoder keeps its random values. Errors: as
    `load_encoder`, with a min_match of 0.9.
    """
    path = Path(path)
    state = read_weights(path)
    encoder: Any = model.encoder
    report = _load_encoder(encoder, state, path, patch, min_match=0.9)
    ours = {n: value for n, value in model.state_dict().items() if not n.startswith("encoder.")}
    if same_decoder and all(n in state and state[n].shape == ours[n].shape for n in ours):
        model.load_state_dict({n: state[n] for n in ours}, strict=False)
        unexpected = tuple(n for n in report.unexpected if n not in ours)
        return dataclasses.replace(report, outside=tuple(ours), unexpected=unexpected)
    has_one = any(n.startswith("decoder.") for n in state)
    why = "the file's is of another objective or shape" if has_one else "the file has none"
    note = f"the decoder is newly initialised: {why}"
    return dataclasses.replace(report, notes=(*report.notes, note))


def _load_encoder(
    encoder: Encoder, tensors: State, path: Path, patch: Triple | None, min_match: float
) -> KeyReport:
    layout = find_layout(tensors, path)
    prefix = layout.prefix
    inside = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
    _require_video_patch(tuple(inside[layout.embedding].shape[2:]), patch, path)
    state = layout.to_ours(inside)
    _require_fixed_positions(state.pop(_POSITIONS, None), encoder, path)
    ours = encoder.state_dict()
    _require_same_shapes(ours, state, path)
    outside = [name for name in tensors if not name.startswith(prefix)]
    report = KeyReport(
        path=path,
        layout=layout.name,
        loaded=tuple(name for name in ours if name in state),
        missing=tuple(name for name in ours if name not in state),
        unexpected=(*outside, *(prefix + name for name in state if name not in ours)),
        notes=tuple(_notes(encoder, state, layout, path)),
    )
    if report.match < min_match:
        raise UserError(
            f"{path} ({layout.name}) has {len(report.loaded)} of {len(ours)} tensors of the "
            f"encoder, less than the required {min_match:.0%}; {_listed(report.missing)} are "
            "missing. Give the file of a whole encoder."
        )
    encoder.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def find_layout(state: State, path: Path) -> Layout:
    """The layout of a file's names. Errors: `UserError` where it is unknown."""
    for layout in LAYOUTS:
        if layout.prefix + layout.embedding in state:
            return layout
    if any(name.startswith("decoder.") for name in state):
        raise UserError(
            f"{path} has a decoder without its encoder ({_grouped(state)}), and only the encoder "
            "transfers. Give the file that has the encoder."
        )
    raise UserError(
        f"{path} has {_grouped(state)}, an unknown layout. Known layouts: "
        f"{'; '.join(layout.name for layout in LAYOUTS)}."
    )


def from_videomae(state: State) -> State:
    """VideoMAE's names to ours."""
    out: State = {}
    for name, value in state.items():
        if name == _CONVOLUTION:
            out[_EMBED] = rearrange(value, "d c pt ph pw -> d (pt ph pw c)")
        elif name.endswith("attn.qkv.weight"):
            out[name] = value
            out.setdefault(name.replace("weight", "bias"), _joined_bias(state, name, value))
        elif not name.endswith(("q_bias", "v_bias")):
            out[name.replace("patch_embed.proj.", "embed.")] = value
    return out


def to_videomae(state: State, patch: Triple) -> State:
    """The inverse of `from_videomae`, without the key bias."""
    pt, ph, pw = patch
    out: State = {}
    for name, value in state.items():
        if name == _EMBED:
            out[_CONVOLUTION] = rearrange(
                value, "d (pt ph pw c) -> d c pt ph pw", pt=pt, ph=ph, pw=pw
            )
        elif name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            out[stem + "q_bias"], _, out[stem + "v_bias"] = value.chunk(3)
        else:
            out[name.replace("embed.bias", "patch_embed.proj.bias")] = value
    return out


def from_huggingface(state: State) -> State:
    """Names of transformers' VideoMAEModel to ours; queries, keys and values become one matrix."""
    names = {theirs: ours for ours, theirs in _HF_NAMES.items()} | _HF_NEWER_NAMES
    plain = {_renamed(name, names): value for name, value in state.items()}
    for name in [name for name in plain if name.endswith(".query.weight")]:
        stem = name.removesuffix("query.weight")
        parts = [plain.pop(f"{stem}{part}.weight", None) for part in _HF_PARTS]
        matrices = [part for part in parts if part is not None]
        if len(matrices) == len(_HF_PARTS):
            plain[f"{stem}qkv.weight"] = torch.cat(matrices)
    return from_videomae(plain)


def to_huggingface(state: State, patch: Triple) -> State:
    """Our names to those of transformers' VideoMAEModel, as its published files have them."""
    out: State = {}
    for name, value in to_videomae(state, patch).items():
        renamed = _renamed(name, _HF_NAMES)
        if name.endswith("attn.qkv.weight"):
            stem = renamed.removesuffix("qkv.weight")
            for part, matrix in zip(_HF_PARTS, value.chunk(3), strict=True):
                out[f"{stem}{part}.weight"] = matrix
        else:
            out[renamed] = value
    return out


# Parts of our names and of transformers'.
_HF_NAMES = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "attn.proj.": "attention.output.dense.",
    "attn.": "attention.attention.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "norm.": "layernorm.",
    "blocks.": "encoder.layer.",
}
# Names of the biases in transformers 5; published files and transformers 4 have VideoMAE's.
_HF_NEWER_NAMES = {"attn.query.bias": "attn.q_bias", "attn.value.bias": "attn.v_bias"}
_HF_PARTS = ("query", "key", "value")


def _renamed(name: str, names: dict[str, str]) -> str:
    """The name with the parts at its start and after a block's number replaced."""
    for old, new in names.items():
        name = re.sub(rf"(^|\.\d+\.){re.escape(old)}", rf"\1{new}", name)
    return name


_HF_CONVOLUTION = f"{_HF_NAMES['patch_embed.proj.']}weight"
LAYOUTS = (
    Layout("VideoMAE of transformers with a head", "videomae.", _HF_CONVOLUTION, from_huggingface),
    Layout("VideoMAEModel of transformers", "", _HF_CONVOLUTION, from_huggingface),
    Layout("VideoMAE, pretraining", "encoder.", _CONVOLUTION, from_videomae),
    Layout("VideoMAE, fine-tuned", "", _CONVOLUTION, from_videomae),
    Layout("arvideo_ds, pretraining or classifier", "encoder.", _EMBED, dict),
    Layout("arvideo_ds, encoder alone", "", _EMBED, dict),
)


# The head's prefix in our classifier; other names of the head and of the norm before it.
_HEAD = "head."
_OTHER_NAMES = {"fc_norm.": "norm.", "classifier.": _HEAD}


def _head_note(theirs: State, ours: State, *, fits: bool, same_classes: bool | None) -> str:
    here, there = (len(state[f"{_HEAD}weight"]) for state in (ours, theirs))
    if not fits:
        return f"the head is newly initialised: the file's has {there} classes, this one {here}"
    if same_classes is None:
        return f"the head is loaded: both have {here} classes, which may differ"
    if same_classes:
        return f"the head is loaded: its {here} classes are the same"
    return f"the head is newly initialised: the file has {there} other classes"


def _joined_bias(state: State, name: str, weight: Tensor) -> Tensor:
    """The bias of queries, keys and values; zero where the file has none."""
    stem = name.removesuffix("qkv.weight")
    none = weight.new_zeros(len(weight) // 3)
    return torch.cat([state.get(stem + "q_bias", none), none, state.get(stem + "v_bias", none)])


def _require_video_patch(kernel: tuple[int, ...], patch: Triple | None, path: Path) -> None:
    """kernel: of the patch convolution; empty in our layouts, which have a matrix."""
    if kernel and len(kernel) != 3:
        raise UserError(
            f"{path} is a model of images: its patches are {_by(kernel)} pixels without frames. "
            "Give the weights of a video model."
        )
    if kernel and patch is not None and kernel != patch:
        raise UserError(
            f"{path} cuts clips into cubes of {_by(kernel)}, the recipe into {_by(patch)}. "
            f"Set model.patch: {list(kernel)}, or give other weights."
        )


def _require_fixed_positions(table: Tensor | None, encoder: Encoder, path: Path) -> None:
    """Refuse learned positions, which would be lost; a fixed table is recomputed."""
    if table is None:
        return
    table = table.detach().float().reshape(-1, table.shape[-1])
    fixed = sincos_1d((len(table), 1, 1), table.shape[1])
    ours = encoder.positions.float()
    same = table.shape == ours.shape and torch.allclose(table, ours.cpu(), atol=1e-3)
    if not same and not torch.allclose(table, fixed, atol=1e-3):
        raise UserError(
            f"{path} has learned positions ({_POSITIONS}); the encoder here uses the fixed table "
            "of model.positions. Give weights with fixed positions."
        )


def _require_same_shapes(ours: State, state: State, path: Path) -> None:
    there, here = _shape(state), _shape(ours)
    if there != here:
        raise UserError(
            f"{path} has an encoder of {_in_words(there)}, the recipe's has {_in_words(here)}. "
            "Change model.size, or give other weights."
        )
    values, expected = state[_EMBED].shape[1], ours[_EMBED].shape[1]
    if values != expected:
        raise UserError(
            f"{path} embeds cubes of {values} values ({values // CHANNELS} pixels of {CHANNELS} "
            f"colours), the recipe's have {expected} ({expected // CHANNELS} pixels). Change "
            "model.patch, or give other weights."
        )
    for name in ours:
        if name in state and state[name].shape != ours[name].shape:
            raise UserError(
                f"{path}: {name} is {_by(state[name].shape)}, the recipe's encoder has "
                f"{_by(ours[name].shape)}. Change model.size, or give other weights."
            )


def _notes(encoder: Encoder, state: State, layout: Layout, path: Path) -> Iterable[str]:
    if isinstance(encoder.norm, nn.Identity) and "norm.weight" in state:
        yield "the encoder's last norm is not loaded: this model normalises the pooled token"
    elif "norm.weight" not in state and not isinstance(encoder.norm, nn.Identity):
        yield "the file's model normalises the pooled token; the encoder's last norm is untrained"
    if layout.to_ours is not dict:
        table = encoder.positions.float().cpu()
        if not torch.allclose(table, sincos_1d((len(table), 1, 1), table.shape[1]), atol=1e-3):
            yield (
                "VideoMAE is trained with the positions of sincos_1d over its grid; this encoder "
                "has another table (model.positions, or interpolated to other clips)"
            )
    block: Any = encoder.blocks[0]
    heads = _heads_of_config(path)
    if heads not in (None, block.attn.num_heads):
        yield f"its config.json has {heads} attention heads, this model {block.attn.num_heads}"


def _heads_of_config(path: Path) -> int | None:
    """Attention heads in a Hugging Face folder's config.json; weights do not show them."""
    try:
        return json.loads((path / "config.json").read_text())["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shape(state: State) -> tuple[int, int]:
    """Width and depth."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    return state[_EMBED].shape[0], len(blocks)


def _in_words(shape: tuple[int, int]) -> str:
    names = [name for name, size in SIZES.items() if (size.width, size.depth) == shape]
    size = f" (model.size: {names[0]})" if names else ""
    return f"width {shape[0]} and depth {shape[1]}{size}"


def _by(shape: Iterable[int]) -> str:
    return "x".join(str(n) for n in shape)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _grouped(names: Iterable[str]) -> str:
    """The first parts of the names, with counts."""
    counts = Counter(name.partition(".")[0] for name in names)
    return _listed(f"{first}.* ({count})" for first, count in counts.items())
