"""Attention rank: right on maps known by construction, of the very maps that the encoder uses."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.data import clips as data_clips
from arvideo_ds.decoding.decoders import DecodeError
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation import attention
from arvideo_ds.evaluation.attention import (
    Clips,
    attention_map,
    attention_spectra,
    draw_ranks,
    effective_rank,
    evenly,
    measured_spectra,
    rank,
    statistics,
)
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.models.encoder import Encoder, build_encoder
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT

CPU = torch.device("cpu")
TOKENS, HEADS, LAYERS = 12, 4, 4
Tiny = Callable[..., PretrainRecipe]


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


def groups(count: int) -> Tensor:
    """Every token attends evenly to those of its own group, and there are so many groups."""
    return torch.block_diag(*[torch.full((TOKENS // count,) * 2, count / TOKENS)] * count)


@pytest.mark.parametrize("count", [1, 2, 4, TOKENS])
def test_the_rank_of_attention_within_groups_is_their_number(count: int) -> None:
    found = spectrum(groups(count))
    assert rank(found, 0.01) == count
    assert effective_rank(found).item() == pytest.approx(count)


def test_uniform_attention_is_of_rank_1_and_attention_to_oneself_of_full_rank() -> None:
    both = torch.stack([torch.full((TOKENS, TOKENS), 1 / TOKENS), torch.eye(TOKENS)])
    assert rank(spectrum(both), 0.01).tolist() == [1, TOKENS]
    assert effective_rank(spectrum(both)).tolist() == pytest.approx([1, TOKENS])


def test_the_threshold_is_a_share_of_the_largest_singular_value() -> None:
    values = torch.tensor([1.0, 0.5, 0.05, 0.005]).double()
    for scale in (1.0, 37.0):
        found = spectrum(scale * values.diag())
        assert [rank(found, t).item() for t in (0.6, 0.1, 0.01, 0.001)] == [1, 2, 3, 4]


def test_the_effective_rank_lies_between_1_and_the_rank_and_ignores_scale() -> None:
    maps = torch.randn(20, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = effective_rank(spectrum(maps))
    assert (found > 1).all()
    assert (found <= rank(spectrum(maps), 0)).all()
    torch.testing.assert_close(effective_rank(spectrum(3 * maps)), found)


def test_the_effective_rank_is_the_entropy_of_shares_of_the_sum() -> None:
    # Shares 3/4 and 1/4: exp(-3/4 ln 3/4 - 1/4 ln 1/4) = 4 / 3^(3/4). A zero adds nothing.
    found = effective_rank(torch.tensor([3.0, 1.0, 0.0]))
    assert found.item() == pytest.approx(4 / 3**0.75)


@pytest.fixture
def encoder(tiny: Tiny) -> Encoder:
    """Of weights large enough that no map is nearly uniform."""
    torch.manual_seed(0)
    encoder = build_encoder(tiny().encoder).eval()
    for block in encoder.blocks:
        block.attn.qkv.weight.data *= 3
    return encoder


def some_clips(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_maps_are_what_the_fused_attention_weighs_its_values_by(encoder: Encoder) -> None:
    block = encoder.blocks[0]
    x = torch.randn(2, TOKENS, 128, generator=torch.Generator().manual_seed(0))
    maps = attention_map(block.attn, x)
    assert maps.shape == (2, HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, HEADS, TOKENS).double())
    v = block.attn.qkv(x).chunk(3, dim=-1)[2]
    v = rearrange(v, "b n (h d) -> b h n d", h=HEADS)
    mixed = rearrange(maps.float() @ v, "b h n d -> b n (h d)")
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_spectra_are_those_of_each_layer_in_its_place(encoder: Encoder, tiny: Tiny) -> None:
    clips = some_clips(2)
    found = attention_spectra(encoder, clips, tiny().patch)
    inputs: list[Tensor] = []
    for block in encoder.blocks:
        block.norm1.register_forward_hook(lambda _module, _inputs, normed: inputs.append(normed))
    again = attention_spectra(encoder, clips, tiny().patch)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    num_tokens = tiny().geometry.num_tokens
    assert found.shape == (2, LAYERS, HEADS, num_tokens)
    for layer, (block, x) in enumerate(zip(encoder.blocks, inputs, strict=True)):
        for clip, head in ((0, 0), (1, 3)):
            one = attention_map(block.attn, x)[clip, head]
            torch.testing.assert_close(found[clip, layer, head], spectrum(one))


def test_one_layers_maps_are_held_at_a_time_and_nothing_stays_on_the_encoder(
    encoder: Encoder, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def watched(module: Any, x: Tensor) -> Tensor:
        assert not [reference for reference in held if reference() is not None]
        maps = attention_map(module, x)
        held.append(weakref.ref(maps))
        return maps

    monkeypatch.setattr(attention, "attention_map", watched)
    attention_spectra(encoder, some_clips(1), tiny().patch)
    assert len(held) == LAYERS
    monkeypatch.setattr(attention, "attention_map", fails)
    with pytest.raises(ZeroDivisionError):
        attention_spectra(encoder, some_clips(1), tiny().patch)
    assert not any(block.attn._forward_pre_hooks for block in encoder.blocks)


def fails(*_: object) -> Tensor:
    raise ZeroDivisionError


def test_statistics_are_over_clips_and_heads_of_each_layer() -> None:
    values = torch.tensor([[[1, 3], [5, 5]], [[1, 7], [5, 5]]])
    found = statistics(values)
    assert found["mean"] == [3, 5]
    assert found["deviation"] == pytest.approx([6**0.5, 0])
    assert found["heads"] == [[1, 5], [5, 5]]


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 3), (97, 64), (1, 1)])
def test_clips_are_spread_over_the_whole(total: int, count: int) -> None:
    numbers = evenly(total, count)
    assert len(set(numbers)) == count
    assert all(0 <= number < total for number in numbers)
    assert total - numbers[-1] <= -(-total // count)


@pytest.fixture
def clips(demo_shards: Path, tiny: Tiny) -> Clips:
    return Clips(ShardSet(demo_shards / "test"), [0, 7, 20, 41], tiny(), num_workers=0)


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(
    encoder: Encoder, clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = measured_spectra(encoder, clips, CPU, tmp_path / "whole", name="")
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attention_spectra(*arguments)

    monkeypatch.setattr(attention, "attention_spectra", counted)
    with pytest.raises(KeyboardInterrupt):
        measured_spectra(encoder, clips, CPU, tmp_path / "parts", name="")
    continued, skipped = measured_spectra(encoder, clips, CPU, tmp_path / "parts", name="")
    assert (len(calls), skipped) == (3 + 2, 0)
    torch.testing.assert_close(continued, whole, rtol=0, atol=0)
    # Another encoder and another cut of the clips are something else.
    other = build_encoder(clips.recipe.encoder)
    measured_spectra(other, clips, CPU, tmp_path / "parts", name="")
    assert len(calls) == 5 + 4
    tree = clips.recipe.model_dump()
    tree["data"]["sampling"] = "uniform"
    uniform = dataclasses.replace(clips, recipe=validate(tree, "test recipe"))
    measured_spectra(encoder, uniform, CPU, tmp_path / "parts", name="")
    assert len(calls) == 9 + 4
    # A file that broke is named, with what to do.
    damaged = next((tmp_path / "whole").rglob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{damaged.name} is damaged"):
        measured_spectra(encoder, clips, CPU, tmp_path / "whole", name="")


def test_clips_that_do_not_decode_are_left_out_and_counted(
    encoder: Encoder, clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = data_clips.EvaluationClips.frames

    def some(*arguments: Any) -> Any:
        if arguments[2].key == broken:
            raise DecodeError("test", "broken")
        return frames(*arguments)

    whole, _ = measured_spectra(encoder, clips, CPU, tmp_path / "whole", name="")
    place = data_clips.EvaluationClips(clips.shards, clips.recipe).places[7]
    broken = clips.shards.index(place[0]).samples[place[1]].key
    monkeypatch.setattr(data_clips.EvaluationClips, "frames", some)
    found, skipped = measured_spectra(encoder, clips, CPU, tmp_path / "some", name="")
    assert skipped == 1
    torch.testing.assert_close(found, whole[[0, 2, 3]], rtol=0, atol=0)
    only = dataclasses.replace(clips, numbers=[7])
    with pytest.raises(UserError, match="none of the 1 clips"):
        measured_spectra(encoder, only, CPU, tmp_path / "none", name="")


def test_the_picture_has_a_line_for_each_encoder_over_its_own_layers() -> None:
    deep, shallow = statistics(torch.rand(3, 6, 2)), statistics(torch.rand(3, 4, 2))
    figure = draw_ranks({"rank": {"a": deep, "b": shallow}, "effective": {"a": deep}}, TOKENS)
    drawn = [[len(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert drawn == [[6, 4], [6]]
    assert figure.axes[0].lines[1].get_ydata().tolist() == shallow["mean"]


Start = Callable[..., int]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """The script, in this process and an empty folder."""
    script = ROOT / "scripts" / "attention_rank.py"
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return int(str(ended.value.code))

    return run


@pytest.fixture
def make_run(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Folders of runs that look finished; other weights than those they began with."""

    def make(name: str, **sections: Any) -> Path:
        recipe = tiny(**sections)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        run_folder.write_recipe(folder, recipe)
        state = {key: 2 * value for key, value in untrained(recipe).state_dict().items()}
        save_file(state, folder / run_folder.MODEL)
        return folder

    return make


@pytest.mark.slow
def test_the_script_compares_a_run_with_its_beginning(
    start: Start,
    make_run: Callable[..., Path],
    demo_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("ours")
    # A file of weights without a recipe is read by the first run's.
    os.link("ours/model.safetensors", "alone.safetensors")
    arguments = ("ours", "untrained:ours", "alone.safetensors", "--shards", demo_shards / "test")
    options = ("--output", "out", "--clips", "3", "--threshold")
    assert start(*arguments, *options, "0.1", "0.01") == 0
    said = capsys.readouterr().out
    document = json.loads(Path("out/attention_rank.json").read_text())
    assert Path("out/attention_rank.png").stat().st_size > 5000
    names = ["ours", "untrained ours", "alone.safetensors"]
    assert document["clips"] == dict.fromkeys(names, 3)
    coarse, fine, effective = document["measures"].values()
    assert "0.1 " in next(iter(document["measures"]))
    for ours, began, alone in (measure.values() for measure in (coarse, fine, effective)):
        assert ours == alone
        assert ours["mean"] != began["mean"]
        assert f"{ours['mean'][0]:.1f} ± {ours['deviation'][0]:.1f}" in said
        assert (len(ours["mean"]), len(ours["heads"][0])) == (LAYERS, HEADS)
    for name in names:
        assert all(a < b for a, b in zip(coarse[name]["mean"], fine[name]["mean"], strict=True))
    # Another threshold reads what was measured.
    kept = {path: path.stat().st_mtime_ns for path in Path("out/spectra").rglob("*.npy")}
    assert len(kept) == 2 * 3
    assert start(*arguments, *options, "0.001") == 0
    assert kept == {path: path.stat().st_mtime_ns for path in Path("out/spectra").rglob("*.npy")}


@pytest.mark.parametrize(
    ("encoders", "options", "words"),
    [
        (["nowhere"], [], ["nowhere has no recipe.yaml", "--recipe"]),
        (["nowhere"], ["--recipe", "demo"], ["there is no nowhere"]),
        (["untrained:nowhere"], ["--recipe", "demo"], ["nowhere has no recipe.yaml"]),
        (["a", "a"], [], ["a is given 2 times"]),
        (["a", "long"], [], ["256 tokens", "512 tokens", "data.frames"]),
        (["a"], ["--threshold", "0"], ["--threshold 0 must be"]),
        (["a"], ["--threshold", "0.01", "1"], ["--threshold 1 must be"]),
        (["a"], ["--clips", "0"], ["--clips 0"]),
        (["a"], ["--shards", "nowhere"], ["nowhere"]),
        (["a"], ["--output", "a/recipe.yaml"], ["is a file"]),
    ],
)
def test_wrong_input_is_answered_in_one_paragraph(
    encoders: Sequence[str],
    options: Sequence[str],
    words: Sequence[str],
    start: Start,
    make_run: Callable[..., Path],
    demo_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a")
    make_run("long", data={"frames": 16})
    capsys.readouterr()
    code = start(*encoders, "--shards", demo_shards / "test", "--output", "out", *options)
    (*_, said) = capsys.readouterr().err.strip().split("\n")
    assert code == 2
    assert said.startswith("error: ")
    assert all(word in said for word in words), said
    assert not Path("out").exists()


def test_runs_that_are_unfinished_or_no_pretraining_are_said_to_be_so(
    start: Start,
    tiny_finetune: Callable[..., FinetuneRecipe],
    demo_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("tuned").mkdir()
    run_folder.write_recipe(Path("tuned"), tiny_finetune())
    options = ("--shards", demo_shards / "test", "--output", "out")
    assert start("untrained:tuned", *options) == 2
    assert "expected a pretraining run, but" in capsys.readouterr().err
    assert start("tuned", *options) == 2
    assert "the run in tuned is not finished" in capsys.readouterr().err
