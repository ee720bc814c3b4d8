"""Weights of any layout: the same features as their source, and wrong files said in words."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.encoder import Encoder, build_encoder, encode_clips
from arvideo_ds.models.layouts import (
    load_classifier_weights,
    load_encoder,
    to_huggingface,
    to_videomae,
)
from arvideo_ds.models.positions import position_table
from arvideo_ds.tasks.pretrain import build_objective

State = dict[str, Tensor]
GRID, PATCH, WIDTH, DEPTH, HEADS, MLP = (4, 4, 4), (2, 4, 4), 48, 2, 4, 96
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def make_encoder(
    *, width: int = WIDTH, depth: int = DEPTH, patch: Triple = PATCH, final_norm: bool = True
) -> Encoder:
    encoder = Encoder(
        positions=position_table("sincos_1d", GRID, width),
        cube_values=3 * patch[0] * patch[1] * patch[2],
        depth=depth,
        heads=HEADS,
        mlp=MLP,
        final_norm=final_norm,
    )
    return randomized(encoder).eval()


def randomized(model: Any, seed: int = 0) -> Any:
    """All weights random, the key bias too: at their start most biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


def random_clips() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (2, 8, 16, 16, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def features(encoder: Encoder) -> Tensor:
    return encode_clips(encoder, random_clips(), PATCH)


def videomae_state() -> State:
    """A checkpoint as the published ones: no key bias, a 3D convolution."""
    return to_videomae(make_encoder().state_dict(), PATCH)


def videomae_features(state: State) -> Tensor:
    """What the published model computes with these weights, written down independently."""
    pixels = ((random_clips() / 255 - MEAN) / STD).permute(0, 4, 1, 2, 3)
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv3d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = x + position_table("sincos_1d", GRID, WIDTH)
    for number in range(DEPTH):
        own = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{number}.")}
        y = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        biases = torch.cat([own["attn.q_bias"], torch.zeros(WIDTH), own["attn.v_bias"]])
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in F.linear(y, own["attn.qkv.weight"], biases).chunk(3, dim=-1)
        )
        scores = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(2, 3)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, own["attn.proj.weight"], own["attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def fresh(**shape: object) -> Encoder:
    """Another encoder than the one whose weights are loaded."""
    return randomized(make_encoder(**shape), seed=7)  # type: ignore[arg-type]


def saved(folder: Path, tree: object, name: str = "weights.pth") -> Path:
    path = folder / name
    torch.save(tree, path)
    return path


PRETRAINED = {
    **prefixed(videomae_state(), "encoder."),
    "encoder_to_decoder.weight": torch.ones(24, WIDTH),
    "mask_token": torch.ones(1, 1, 24),
    "decoder.blocks.0.norm1.weight": torch.ones(24),
}
FINE_TUNED = {
    **{k: v for k, v in videomae_state().items() if not k.startswith("norm.")},
    "fc_norm.weight": torch.ones(WIDTH),
    "fc_norm.bias": torch.ones(WIDTH),
    "head.weight": torch.ones(5, WIDTH),
}
ARGUMENTS = argparse.Namespace(model="pretrain_videomae_base_patch16_224", lr=1e-3, opt_betas=None)


@pytest.mark.parametrize(
    "tree",
    [
        PRETRAINED,
        {"model": PRETRAINED},
        {"model": PRETRAINED, "optimizer": {"state": {}}, "epoch": 799, "args": ARGUMENTS},
        {"module": PRETRAINED, "dp_world_size": 8},
        {"model": prefixed(PRETRAINED, "module.")},
        prefixed(PRETRAINED, "_orig_mod."),
    ],
    ids=["plain", "model", "with arguments", "module", "wrapped", "compiled"],
)
def test_a_published_pretraining_file_gives_its_model_s_features(
    tree: object, tmp_path: Path
) -> None:
    encoder = fresh()
    report = load_encoder(encoder, saved(tmp_path, tree), patch=PATCH)
    assert report.match == 1 and not report.missing
    assert set(report.unexpected) == {k for k in PRETRAINED if not k.startswith("encoder.")}
    assert "pretraining" in str(report) and "decoder.* (1)" in str(report)
    torch.testing.assert_close(features(encoder), videomae_features(videomae_state()))


def test_torch_s_older_file_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": PRETRAINED, "args": ARGUMENTS}, path, _use_new_zipfile_serialization=False)
    assert load_encoder(fresh(), path).match == 1


def test_a_published_fine_tuned_file_fills_an_encoder_without_last_norm(tmp_path: Path) -> None:
    encoder = fresh(final_norm=False)
    report = load_encoder(encoder, saved(tmp_path, {"model": FINE_TUNED}))
    assert report.match == 1
    assert set(report.unexpected) == {"fc_norm.weight", "fc_norm.bias", "head.weight"}
    state = {**videomae_state(), "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    normed = F.layer_norm(features(encoder), (WIDTH,), eps=1e-6)
    torch.testing.assert_close(normed, videomae_features(state))


def test_an_encoder_without_last_norm_leaves_the_file_s_aside_and_says_so(tmp_path: Path) -> None:
    report = load_encoder(fresh(final_norm=False), saved(tmp_path, PRETRAINED))
    assert {"encoder.norm.weight", "encoder.norm.bias"} <= set(report.unexpected)
    assert "last norm is not loaded" in str(report)


def test_an_encoder_with_last_norm_says_that_a_fine_tuned_file_has_none(tmp_path: Path) -> None:
    encoder = fresh()
    before = encoder.norm.weight.clone()
    report = load_encoder(encoder, saved(tmp_path, FINE_TUNED))
    assert report.missing == ("norm.weight", "norm.bias")
    assert "untrained" in str(report)
    assert torch.equal(encoder.norm.weight, before)


def test_a_key_bias_changes_no_feature() -> None:
    """Why VideoMAE has none, and why leaving ours out of an export loses nothing."""
    encoder = make_encoder()
    before = features(encoder)
    for block in encoder.blocks:
        block.attn.qkv.bias.data[WIDTH : 2 * WIDTH] = 0
    torch.testing.assert_close(features(encoder), before)


@pytest.mark.parametrize("kind", ["VideoMAEModel", "ForPreTraining", "ForVideoClassification"])
def test_a_model_saved_by_transformers_gives_its_features(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=4, num_frames=8, tubelet_size=2, hidden_size=WIDTH,
        num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP,
        layer_norm_eps=1e-6, use_mean_pooling=False, decoder_hidden_size=24,
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_intermediate_size=48,
    )  # fmt: skip
    source = randomized(getattr(transformers, kind.replace("For", "VideoMAEFor"))(config)).eval()
    source.save_pretrained(tmp_path)
    encoder = fresh()
    report = load_encoder(encoder, tmp_path, patch=PATCH)
    assert report.match == 1 and not report.notes
    pixels = ((random_clips() / 255 - MEAN) / STD).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        wanted = getattr(source, "videomae", source)(pixels).last_hidden_state
    torch.testing.assert_close(features(encoder), wanted)


def test_biases_are_read_under_the_names_of_both_versions_of_transformers(tmp_path: Path) -> None:
    published = to_huggingface(make_encoder().state_dict(), PATCH)
    newer = {
        name.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): value
        for name, value in published.items()
    }
    assert published.keys() != newer.keys()
    for state in (published, newer):
        encoder = fresh()
        load_encoder(encoder, saved(tmp_path, state))
        torch.testing.assert_close(features(encoder), features(make_encoder()))


def test_other_attention_heads_beside_the_weights_are_noted(tmp_path: Path) -> None:
    saved(tmp_path, to_huggingface(make_encoder().state_dict(), PATCH), "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 16}))
    assert "16 attention heads, this model 4" in str(load_encoder(fresh(), tmp_path))


def test_our_own_files_load(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(model={"size": "tiny"})
    for number, source in enumerate((build_objective(recipe), Classifier(recipe.encoder, 5))):
        randomized(source, seed=number)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(source.state_dict(), folder / "model.safetensors")
        encoder = build_encoder(recipe.encoder, final_norm=number == 0)
        report = load_encoder(encoder, folder, patch=recipe.patch)
        assert report.match == 1 and not report.notes
        assert {name.partition(".")[0] for name in report.unexpected} <= {"decoder", "norm", "head"}
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, source.encoder.state_dict()[name])
    alone = tmp_path / "alone.safetensors"
    save_file(source.encoder.state_dict(), alone)
    assert load_encoder(build_encoder(recipe.encoder, final_norm=False), alone).match == 1


def as_videomae(state: State, patch: Triple) -> State:
    """A classifier of ours under the names of VideoMAE's and V2's fine-tuned files."""
    ours = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return {
        **to_videomae(ours, patch),
        **{f"fc_{k}": state[k] for k in ("norm.weight", "norm.bias")},
        **{k: state[k] for k in ("head.weight", "head.bias")},
    }


def as_transformers(state: State, patch: Triple) -> State:
    ours = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return {
        **prefixed(to_huggingface(ours, patch), "videomae."),
        **{f"fc_{k}": state[k] for k in ("norm.weight", "norm.bias")},
        **{f"classifier.{k}": state[f"head.{k}"] for k in ("weight", "bias")},
    }


FILES: dict[str, Callable[[State, Triple], object]] = {
    "ours": lambda state, patch: state,
    "VideoMAE": lambda state, patch: {"model": as_videomae(state, patch)},
    "VideoMAE V2": lambda state, patch: {"module": as_videomae(state, patch)},
    "transformers": as_transformers,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("classes", "same", "kept"),
    [(5, True, True), (5, None, True), (5, False, False), (7, None, False)],
    ids=["same classes", "classes unknown", "other classes", "another number"],
)
def test_a_classifier_begins_with_a_classifier_s_norm_and_a_head_that_fits(
    file: str, classes: int, same: bool | None, kept: bool, tiny: Any, tmp_path: Path
) -> None:
    recipe = tiny(model={"size": "tiny"})
    source, target = (
        randomized(Classifier(recipe.encoder, 5)),
        randomized(Classifier(recipe.encoder, classes), 3),
    )
    fresh_head = target.head.weight.clone()
    path = saved(tmp_path, FILES[file](source.state_dict(), recipe.patch))
    report = load_classifier_weights(target, path, patch=recipe.patch, same_classes=same)
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert torch.equal(target.norm.bias, source.norm.bias)
    head = source.head.weight if kept else fresh_head
    assert torch.equal(target.head.weight, head)
    assert report.match == 1
    assert "outside the encoder: norm.weight" in str(report)
    assert f"the head is {'loaded' if kept else 'newly initialised'}" in str(report)
    # Nothing is counted as unused that was taken, and the other way round.
    assert any("head" in n or "classifier" in n for n in report.unexpected) != kept
    assert not any("norm" in name for name in report.unexpected)


def test_a_classifier_that_pools_otherwise_gives_its_encoder_alone(
    tiny: Any, tiny_finetune: Any, tmp_path: Path
) -> None:
    source = randomized(Classifier(tiny(model={"size": "tiny"}).encoder, 5))
    recipe = tiny_finetune(finetune={"pooling": "attention"})
    target = Classifier(recipe.encoder, 7, pooling=recipe.pooling)
    report = load_classifier_weights(target, saved(tmp_path, source.state_dict()))
    assert report.outside == ()
    assert "newly initialised: class_attention." in str(report)


def test_a_pretraining_file_has_nothing_beside_the_encoder(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(model={"size": "tiny"})
    target = Classifier(recipe.encoder, 5)
    norm = target.norm.weight.clone()
    report = load_classifier_weights(target, saved(tmp_path, build_objective(recipe).state_dict()))
    assert report.outside == ()
    assert torch.equal(target.norm.weight, norm)


def test_positions_of_another_scheme_are_noted(tmp_path: Path) -> None:
    encoder = fresh()
    encoder.positions = position_table("sincos_3d", GRID, WIDTH)
    assert "sincos_1d" in str(load_encoder(encoder, saved(tmp_path, PRETRAINED)))


def test_a_fixed_table_in_the_file_is_no_hindrance_and_a_learned_one_is_refused(
    tmp_path: Path,
) -> None:
    table = position_table("sincos_1d", (2, 8, 8), WIDTH)[None]  # of any grid
    load_encoder(fresh(), saved(tmp_path, {**FINE_TUNED, "pos_embed": table}))
    with pytest.raises(UserError, match="has learned positions"):
        load_encoder(fresh(), saved(tmp_path, {**FINE_TUNED, "pos_embed": table + 0.1}))


def refused(path: Path, encoder: Encoder | None = None, **options: object) -> str:
    """The message about a file; the encoder is untouched."""
    encoder = encoder or fresh()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoder(encoder, path, **options)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_size_is_named(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    wide = make_encoder(width=384, depth=12).state_dict()
    message = refused(saved(tmp_path, prefixed(wide, "encoder.")), build_encoder(tiny().encoder))
    for part in ("width 384", "depth 12", "model.size: S", "width 128", "model.size: tiny"):
        assert part in message
    assert "depth 3" in refused(saved(tmp_path, make_encoder(depth=3).state_dict()))


def test_another_patch_is_named(tmp_path: Path) -> None:
    other = make_encoder(patch=(2, 8, 8))
    videomae = saved(tmp_path, to_videomae(other.state_dict(), (2, 8, 8)))
    assert "model.patch: [2, 8, 8]" in refused(videomae, patch=PATCH)
    assert "384 values" in refused(videomae)
    assert "384 values" in refused(saved(tmp_path, other.state_dict()))
    # As many values, in another order: only the recipe's patch tells.
    turned = saved(tmp_path, to_videomae(make_encoder().state_dict(), (1, 4, 8)))
    assert "cubes of 1x4x8, the recipe into 2x4x4" in refused(turned, patch=PATCH)


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    image = {**FINE_TUNED, "patch_embed.proj.weight": torch.ones(WIDTH, 3, 4, 4)}
    assert "model of images" in refused(saved(tmp_path, image))


def test_a_decoder_alone_is_refused(tmp_path: Path) -> None:
    decoder = {name: value for name, value in PRETRAINED.items() if "encoder." not in name}
    decoder["decoder.norm.weight"] = torch.ones(24)
    assert "decoder without its encoder" in refused(saved(tmp_path, decoder))


def test_other_weights_are_refused_with_their_names(tmp_path: Path) -> None:
    message = refused(saved(tmp_path, {"conv1.weight": torch.ones(3), "conv1.bias": torch.ones(3)}))
    assert "conv1.* (2)" in message and "VideoMAE, pretraining" in message


def test_too_few_tensors_are_refused_and_the_limit_can_be_moved(tmp_path: Path) -> None:
    some = {k: v for k, v in PRETRAINED.items() if not re.search(r"mlp", k)}
    path = saved(tmp_path, some)
    message = refused(path)
    assert "20 of 28" in message and "mlp.fc1.weight" in message
    assert len(load_encoder(fresh(), path, min_match=0.5).missing) == 8


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_said_to_be_damaged(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in PRETRAINED.items()}, path)
    else:
        torch.save(PRETRAINED, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[damage])
    assert f"{name} is damaged" in refused(path)


class Code:
    """What a malicious file would hold: a call made while reading."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "torch, older format", "pickle"])
def test_a_file_with_code_is_refused_and_nothing_of_it_runs(how: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    tree = {"model": PRETRAINED, "args": Code(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(tree))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=how == "torch")
    message = refused(path)
    assert ("did not write it" if how == "pickle" else "(posix.mkdir)") in message
    assert not marker.exists()


def test_no_other_object_of_python_comes_in_with_the_arguments(tmp_path: Path) -> None:
    arguments = argparse.Namespace(output=Path("somewhere"))
    message = refused(saved(tmp_path, {"model": PRETRAINED, "args": arguments}))
    assert "pathlib" in message and "torch.save(model.state_dict(), FILE)" in message


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    assert "Nothing is downloaded" in refused(tmp_path / "MCG-NJU" / "videomae-base")
    assert "neither model.safetensors" in refused(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    assert "not finished" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    assert "several parts" in refused(tmp_path)
    (tmp_path / "weights.h5").touch()
    assert "must end in" in refused(tmp_path / "weights.h5")
    assert "no weights by name" in refused(saved(tmp_path, {"model": {"epoch": 3}}))
    assert "no weights by name" in refused(saved(tmp_path, [torch.ones(2)]))
