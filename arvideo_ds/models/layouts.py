"""The encoder's weights under the names that other programs give them, and loading any of them.

One ViT, several layouts. They differ in names, in the patch embedding (a 3D convolution there, one
matrix over a cube's values here) and in the attention's biases. VideoMAE has none for the keys:
softmax takes no notice of a number added to a whole row of scores, and q (k + b) adds q b, which
is the same for every key. So a key bias is zero on the way in and dropped on the way out.

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
    """How a kind of file names an encoder: below `prefix`, recognised by the key `marker`."""

    name: str
    marker: str
    prefix: str
    to_ours: Callable[[State], State]


@dataclass(frozen=True)
class KeyReport:
    """What became of every tensor; printed, a few lines for people.

    loaded, missing: names of our encoder; missing ones keep the values they had. unexpected: names
    of the file that nothing has a place for. notes: what else is worth knowing. beside: names of
    our model outside its encoder that were loaded (`load_classifier_weights`).
    """

    path: Path
    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def match(self) -> float:
        """Share of the encoder's tensors that the file had."""
        return len(self.loaded) / (len(self.loaded) + len(self.missing))

    def __str__(self) -> str:
        whole = len(self.loaded) + len(self.missing)
        lines = [f"weights of {self.path} ({self.layout}): {len(self.loaded)} of {whole} tensors"]
        if self.beside:
            lines.append(f"  beside the encoder: {_listed(self.beside)}")
        if self.missing:
            lines.append(f"  not in the file, left as they were: {_listed(self.missing)}")
        if self.unexpected:
            lines.append(f"  in the file, not used: {_grouped(self.unexpected)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_encoder(
    encoder: Encoder, path: str | Path, *, patch: Triple | None = None, min_match: float = 0.9
) -> KeyReport:
    """Load an encoder from a file or folder in any layout of `LAYOUTS`; the rest is left aside.

    patch: of the recipe, compared with the file's where both are known. min_match: least share of
    the encoder's tensors that the file must have. Positions are no weights: they are recomputed
    from the shape of the clip. An encoder without its last norm takes none from the file.
    Every rank loads for itself. Errors: `UserError` for a file that cannot be read
    (`read_weights`), of an unknown layout, of another width, depth or patch, with learned
    positions, or with too few of the encoder's tensors; the encoder then is as it was.
    """
    path = Path(path)
    return _load_encoder(encoder, read_weights(path), path, patch, min_match)


def load_classifier_weights(
    model: nn.Module,
    path: str | Path,
    *,
    patch: Triple | None = None,
    same_classes: bool | None = None,
) -> KeyReport:
    """Load what a classifier or detector begins with: the encoder, and what a classifier adds.

    model: with `encoder` and `head`. Of a classifier's file (also `fc_norm` of VideoMAE's) its norm
    before the head and its class attention are taken over where shapes match, and its head where
    shapes match and the classes are not known to be others: same_classes is None where they are not
    known. VideoMAE's official code keeps the same (run_class_finetuning.py: only a head of another
    shape is dropped). Errors: as `load_encoder`, 90 % of whose tensors must be there.
    """
    path = Path(path)
    found = read_weights(path)
    encoder: Any = model.encoder
    report = _load_encoder(encoder, found, path, patch, min_match=0.9)
    theirs = _beside_encoder(found, find_layout(found, path))
    if f"{_HEAD}weight" not in theirs:
        return report
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    fits = [name for name in own if name in theirs and theirs[name].shape == own[name].shape]
    whole_head = all(name in fits for name in own if name.startswith(_HEAD))
    keeps_head = whole_head and same_classes is not False
    taken = [name for name in fits if keeps_head or not name.startswith(_HEAD)]
    model.load_state_dict({name: theirs[name] for name in taken}, strict=False)
    return dataclasses.replace(
        report,
        beside=tuple(taken),
        unexpected=tuple(n for n in report.unexpected if _own_name(n) not in taken),
        notes=(
            *report.notes,
            _about_head(theirs, own, whole=whole_head, same_classes=same_classes),
            *_about_missing(own, taken),
        ),
    )


def _load_encoder(
    encoder: Encoder, found: State, path: Path, patch: Triple | None, min_match: float
) -> KeyReport:
    layout = find_layout(found, path)
    inside = {
        name.removeprefix(layout.prefix): value
        for name, value in found.items()
        if name.startswith(layout.prefix)
    }
    _require_video_patch(tuple(found[layout.marker].shape[2:]), patch, path)
    state = layout.to_ours(inside)
    _require_fixed_positions(state.pop(_POSITIONS, None), encoder, path)
    _require_same_size(encoder, state, path)
    own = encoder.state_dict()
    loaded = [name for name in own if name in state]
    report = KeyReport(
        path=path,
        layout=layout.name,
        loaded=tuple(loaded),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(
            [name for name in found if not name.startswith(layout.prefix)]
            + [layout.prefix + name for name in state if name not in own]
        ),
        notes=tuple(_notes(encoder, state, layout, path)),
    )
    _require_match(report, min_match)
    encoder.load_state_dict({name: state[name] for name in loaded}, strict=False)
    return report


def find_layout(state: State, path: Path) -> Layout:
    """The layout of a file's names. Errors: `UserError` where it is none that we know."""
    for layout in LAYOUTS:
        if layout.marker in state:
            return layout
    if any(name.startswith("decoder.") for name in state):
        raise UserError(
            f"{path} holds a decoder without its encoder ({_grouped(state)}), and only the encoder "
            "transfers. Give the file that holds the encoder."
        )
    raise UserError(
        f"{path} holds {_grouped(state)}, which is no layout known here. Known are "
        f"{'; '.join(layout.name for layout in LAYOUTS)}."
    )


def from_ours(state: State) -> State:
    return dict(state)


def from_videomae(state: State) -> State:
    """VideoMAE's names to ours: the same blocks, a convolution, biases of queries and values."""
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
    """The inverse of `from_videomae`, but for the key bias, which is dropped."""
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
    plain: State = {}
    for name, value in state.items():
        attention = _HF_ATTENTION.match(name)
        if attention is None:
            plain[_renamed(name, {theirs: ours for ours, theirs in _HF_NAMES})] = value
        elif attention["what"] in _HF_BIASES:
            short = _HF_BIASES[attention["what"]]
            plain[f"blocks.{attention['block']}.attn.{short}"] = value
        elif attention["what"] == "query.weight":
            stem = name.removesuffix("query.weight")
            names = [f"{stem}{part}.weight" for part in ("query", "key", "value")]
            if all(part in state for part in names):
                joined = torch.cat([state[part] for part in names])
                plain[f"blocks.{attention['block']}.attn.qkv.weight"] = joined
    return from_videomae(plain)


def to_huggingface(state: State, patch: Triple) -> State:
    """Our names to those of transformers' VideoMAEModel, as its published files have them."""
    out: State = {}
    for name, value in to_videomae(state, patch).items():
        attention = re.match(r"blocks\.(\d+)\.attn\.(qkv\.weight|q_bias|v_bias)$", name)
        if attention is None:
            out[_renamed(name, dict(_HF_NAMES))] = value
            continue
        stem = f"encoder.layer.{attention[1]}.attention.attention."
        if attention[2] == "qkv.weight":
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{stem}{part}.weight"] = matrix
        else:
            out[stem + attention[2]] = value
    return out


# Our name and transformers'; parts of names, the first that fits is replaced, and blocks besides.
_HF_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("norm.", "layernorm."),
    ("blocks.", "encoder.layer."),
)
_HF_ATTENTION = re.compile(r"encoder\.layer\.(?P<block>\d+)\.attention\.attention\.(?P<what>.+)$")
# Published files and transformers 4 have the short names, transformers 5 the others.
_HF_BIASES = {
    "q_bias": "q_bias",
    "v_bias": "v_bias",
    "query.bias": "q_bias",
    "value.bias": "v_bias",
}

LAYOUTS = (
    Layout(
        "VideoMAE of transformers, with a head or decoder",
        "videomae.embeddings.patch_embeddings.projection.weight",
        "videomae.",
        from_huggingface,
    ),
    Layout(
        "VideoMAEModel of transformers",
        "embeddings.patch_embeddings.projection.weight",
        "",
        from_huggingface,
    ),
    Layout("VideoMAE, pretraining", f"encoder.{_CONVOLUTION}", "encoder.", from_videomae),
    Layout("VideoMAE, fine-tuned", _CONVOLUTION, "", from_videomae),
    Layout("arvideo_ds, pretraining or classifier", f"encoder.{_EMBED}", "encoder.", from_ours),
    Layout("arvideo_ds, encoder alone", _EMBED, "", from_ours),
)


# The head's names in our classifier, and what others call it and the norm before it.
_HEAD = "head."
_BESIDE_NAMES = (("fc_norm.", "norm."), ("classifier.", _HEAD))


def _own_name(name: str) -> str:
    for theirs, ours in _BESIDE_NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _beside_encoder(found: State, layout: Layout) -> State:
    """What a file holds beside its encoder, by the names of our classifier."""
    if layout.prefix:
        outside = [name for name in found if not name.startswith(layout.prefix)]
    else:  # `norm` is the encoder's own last one there
        outside = [
            name for name in found if name.startswith(("fc_norm.", "class_attention.", _HEAD))
        ]
    return {_own_name(name): found[name] for name in outside}


def _about_head(theirs: State, own: State, *, whole: bool, same_classes: bool | None) -> str:
    here, there = (len(state[f"{_HEAD}weight"]) for state in (own, theirs))
    if not whole:
        return f"the head begins anew: the file's has {there} classes, this one {here}"
    if same_classes is None:
        return f"the head is the file's: it has {here} classes too; which ones is not known"
    if same_classes:
        return f"the head is the file's: its {here} classes are the same"
    return f"the head begins anew: the file's {there} classes are others"


def _about_missing(own: State, taken: Iterable[str]) -> Iterable[str]:
    names = [n for n in own if n not in taken and not n.startswith(_HEAD)]
    if names:
        yield f"before the head begins anew: {_listed(names)} (the file pools its tokens otherwise)"


def _renamed(name: str, names: dict[str, str]) -> str:
    """`blocks.3.norm1.weight` is two renamings: of the block and of the part."""
    block = re.match(r"(blocks\.|encoder\.layer\.)(\d+\.)", name)
    head, rest = (names[block[1]] + block[2], name[block.end() :]) if block else ("", name)
    for old, new in names.items():
        if rest.startswith(old):
            return head + new + rest.removeprefix(old)
    return head + rest


def _joined_bias(state: State, name: str, weight: Tensor) -> Tensor:
    """The bias of queries, keys and values; what the file leaves out is zero."""
    stem = name.removesuffix("qkv.weight")
    none = weight.new_zeros(len(weight) // 3)
    return torch.cat([state.get(stem + "q_bias", none), none, state.get(stem + "v_bias", none)])


def _require_video_patch(kernel: tuple[int, ...], patch: Triple | None, path: Path) -> None:
    """kernel: what follows the input's axis in the embedding's shape; nothing in our layouts."""
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
    """Learned positions would be lost without a word; a fixed table is only recomputed."""
    if table is None:
        return
    table = table.detach().float().reshape(-1, table.shape[-1])
    fixed = sincos_1d((len(table), 1, 1), table.shape[1])
    ours = encoder.positions.float()
    same = table.shape == ours.shape and torch.allclose(table, ours.cpu(), atol=1e-3)
    if not same and not torch.allclose(table, fixed, atol=1e-3):
        raise UserError(
            f"{path} was trained with positions of its own ({_POSITIONS}), which the encoder here "
            "does not have: it uses the fixed table of model.positions. Give weights with fixed "
            "positions."
        )


def _require_same_size(encoder: Encoder, state: State, path: Path) -> None:
    own = encoder.state_dict()
    there, here = _shape(state), _shape(own)
    if there != here:
        raise UserError(
            f"{path} holds an encoder of width {there[0]} and depth {there[1]}"
            f"{_size_name(there)}, the recipe's has width {here[0]} and depth {here[1]}"
            f"{_size_name(here)}. Change model.size, or give other weights."
        )
    values, wanted = state[_EMBED].shape[1], own[_EMBED].shape[1]
    if values != wanted:
        raise UserError(
            f"{path} embeds cubes of {values} values ({values // CHANNELS} pixels of {CHANNELS} "
            f"colours), the recipe's have {wanted} ({wanted // CHANNELS} pixels). Change "
            "model.patch, or give other weights."
        )
    for name in own:
        if name in state and state[name].shape != own[name].shape:
            raise UserError(
                f"{path}: {name} is {_by(state[name].shape)}, the recipe's encoder has "
                f"{_by(own[name].shape)}. Change model.size, or give other weights."
            )


def _require_match(report: KeyReport, min_match: float) -> None:
    if report.match < min_match:
        raise UserError(
            f"{report.path} ({report.layout}) holds {len(report.loaded)} of "
            f"{len(report.loaded) + len(report.missing)} tensors of the encoder, less than the "
            f"{min_match:.0%} asked for; {_listed(report.missing)} are missing. Give the file of "
            "a whole encoder."
        )


def _notes(encoder: Encoder, state: State, layout: Layout, path: Path) -> Iterable[str]:
    if isinstance(encoder.norm, nn.Identity) and "norm.weight" in state:
        yield "the encoder's last norm is left aside: this model normalises the pooled token"
    elif "norm.weight" not in state and not isinstance(encoder.norm, nn.Identity):
        yield "the file's model normalises the pooled token; the encoder's last norm is untrained"
    if layout.to_ours is not from_ours:
        own = encoder.positions.float().cpu()
        if not torch.allclose(own, sincos_1d((len(own), 1, 1), own.shape[1]), atol=1e-3):
            yield (
                "VideoMAE is trained with the positions of sincos_1d over its grid; this encoder "
                "holds another table (model.positions, or interpolated)"
            )
    block: Any = encoder.blocks[0]
    heads = _heads_beside(path)
    if heads not in (None, block.attn.num_heads):
        yield f"its config.json says {heads} attention heads, this has {block.attn.num_heads}"


def _heads_beside(path: Path) -> int | None:
    """Heads by a Hugging Face folder's config.json: weights do not show them."""
    try:
        return json.loads((path / "config.json").read_text())["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shape(state: State) -> tuple[int, int]:
    """Width and depth."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    return state[_EMBED].shape[0], len(blocks)


def _size_name(shape: tuple[int, int]) -> str:
    names = [name for name, size in SIZES.items() if (size.width, size.depth) == shape]
    return f" (model.size: {names[0]})" if names else ""


def _by(shape: Iterable[int]) -> str:
    return "x".join(str(n) for n in shape)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _grouped(names: Iterable[str]) -> str:
    """By their first part, with counts: 64 names of a decoder are one word."""
    counts = Counter(name.partition(".")[0] for name in names)
    return _listed(f"{first}.* ({count})" for first, count in counts.items())
