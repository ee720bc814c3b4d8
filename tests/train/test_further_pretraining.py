"""Pretraining that starts from the weights of another run: what it loads, and on which grid."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.engine.checkpoints import newest_checkpoint
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import build_objective
from arvideo_ds.exports.source import export_encoder, read_source
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.tensors import load_tensors, save_tensors
from arvideo_ds.models.layouts import to_videomae
from arvideo_ds.models.objective import Objective
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.specs.pretrain import Pretraining
from arvideo_ds.tasks.transfer import settle_transfer
from tests.train.conftest import Runs

Make = Callable[..., PretrainRecipe]
WIDE = {"frames": 16, "size": 48}


@pytest.fixture
def source(tiny: Make, tmp_path: Path) -> Path:
    """The folder of a finished run, clips of 8 x 32 x 32."""
    folder = tmp_path / "source"
    keep(tiny(), folder)
    save_tensors(random_state(build_objective(tiny())), folder / run_folder.MODEL)
    return folder


def keep(recipe: PretrainRecipe, folder: Path) -> None:
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)


def random_state(model: Objective) -> dict[str, Tensor]:
    """A state whose every tensor differs from that of a new model, biases and norms too."""
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def start(recipe: PretrainRecipe) -> tuple[dict[str, Tensor], str]:
    """The state that a run of the recipe starts with, and the report."""
    task = Pretraining(recipe)
    module = task.build(None)  # type: ignore[arg-type]
    report = task.initialize(module, None)  # type: ignore[arg-type]
    assert report is not None
    return module.model.state_dict(), report


def loaded(state: dict[str, Tensor], weights: dict[str, Tensor], part: str) -> set[bool]:
    """Whether the tensors of a part of the model are those of the weights."""
    return {torch.equal(state[name], weights[name]) for name in state if name.startswith(part)}


def test_a_run_passes_on_encoder_and_decoder(source: Path, tiny: Make) -> None:
    weights = load_tensors(source / run_folder.MODEL)
    for where in (source, source / run_folder.MODEL):
        state, report = start(tiny(pretrain={"init_from": str(where)}))
        assert loaded(state, weights, "") == {True}
        assert "outside the encoder: decoder." in report
        assert "not used" not in report


@pytest.mark.parametrize(
    "change",
    [
        {"objective": {"name": "videomae"}},
        {"objective": {"normalize_targets": False}},
        {"decoder": {"width": 64}},
        {"decoder": {"depth": 1}},
        {"decoder": {"heads": 6}},
        {"decoder": {"self_attention": True}},
    ],
    ids=str,
)
def test_a_decoder_that_predicts_otherwise_starts_from_random_weights(
    change: dict[str, dict[str, object]], source: Path, tiny: Make
) -> None:
    """Heads, too, which no shape of a tensor shows."""
    state, report = start(tiny(pretrain={"init_from": str(source)}, **change))
    weights = load_tensors(source / run_folder.MODEL)
    assert loaded(state, weights, "encoder.") == {True}
    shared = {name: value for name, value in state.items() if name in weights}
    assert loaded(shared, weights, "decoder.") <= {False}
    assert "decoder is newly initialised: the file's is of another objective or shape" in report


def test_features_of_a_teacher_are_other_targets_than_as_many_pixels(tiny: Make) -> None:
    """ViT-S has 384 features, and a cube of 2 x 8 x 8 pixels as many values."""
    model: dict[str, object] = {"size": "S", "patch": [2, 8, 8]}
    pixels = tiny(model=model, objective={"cluster": [2, 2, 2]})
    teacher = {"cluster": [2, 2, 2], "teacher": "ema", "teacher_size": "S"}
    features = tiny(model=model, objective=teacher)
    assert pixels.target_values == features.target_values
    assert pixels.decoding != features.decoding


def test_an_exported_encoder_and_a_published_file_pass_on_the_encoder(
    source: Path, tiny: Make, tmp_path: Path
) -> None:
    weights = load_tensors(source / run_folder.MODEL)
    (tmp_path / "export").mkdir()
    export_encoder(read_source(source, tiny()), tmp_path / "export")
    encoder = read_source(source, tiny()).model.state_dict()
    # A key bias is not part of VideoMAE's files.
    published = {f"encoder.{n}": v for n, v in to_videomae(encoder, tiny().patch).items()}
    torch.save({"model": published | {"decoder.norm.weight": torch.ones(3)}}, tmp_path / "v.pth")
    for where, why in ((tmp_path / "export", "has none"), (tmp_path / "v.pth", "another")):
        state, report = start(tiny(pretrain={"init_from": str(where)}))
        parts = ["encoder.embed", "encoder.norm", "encoder.blocks.3.mlp"]
        assert [loaded(state, weights, part) for part in parts] == [{True}] * 3
        assert "decoder is newly initialised: the file" in report
        assert why in report


def test_clips_of_more_frames_and_pixels_get_interpolated_positions(
    source: Path, tiny: Make, tmp_path: Path
) -> None:
    """The decoder's as the encoder's; the run's own recipe rebuilds both without the source."""
    asked = tiny(data=WIDE, pretrain={"init_from": str(source)})
    recipe = settle_transfer(asked, tmp_path / "run")
    assert recipe.pretrain.pretrained_clip == (8, 32, 32)
    _, report = start(recipe)
    assert "positions: interpolated, from (4, 8, 8) to (8, 12, 12)" in report
    keep(recipe, tmp_path / "run")
    shutil.rmtree(source)
    again = run_folder.read_recipe(tmp_path / "run", PretrainRecipe)
    assert settle_transfer(asked, tmp_path / "run") == recipe == again
    model = build_objective(again)
    for part, width in ((model.encoder, 128), (model.decoder, 96)):
        expected = interpolated_positions("sincos_1d", (4, 8, 8), (8, 12, 12), width)
        assert torch.equal(part.positions, expected)  # type: ignore[arg-type]


def test_a_run_that_starts_from_further_pretraining_gets_its_table(
    source: Path, tiny: Make, tiny_finetune: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    asked = tiny(data=WIDE, pretrain={"init_from": str(source)})
    keep(settle_transfer(asked, tmp_path / "none"), tmp_path / "further")
    start_from = {"init_from": str(tmp_path / "further")}
    tuned = settle_transfer(tiny_finetune(data=WIDE, finetune=start_from), tmp_path / "tuned")
    assert tuned.pretrained_grid == (4, 8, 8)
    # `--resume` settles by the recipe of the run that it continues.
    continued = settle_transfer(tiny(data=WIDE), tmp_path / "further")
    assert continued.pretrained_grid == (4, 8, 8)
    run_folder.require_resumable(tmp_path / "further", continued)


def test_a_started_run_goes_on_whatever_became_of_its_source(
    source: Path, tiny: Make, tmp_path: Path
) -> None:
    """Resuming reads no initial weights, so another path to them changes nothing."""
    first = settle_transfer(tiny(pretrain={"init_from": str(source)}), tmp_path / "run")
    keep(first, tmp_path / "run")
    shutil.rmtree(source)
    (tmp_path / "run" / run_folder.CHECKPOINTS / "step-2").mkdir(parents=True)
    for moved in (str(source), str(tmp_path / "elsewhere"), None):
        again = settle_transfer(tiny(pretrain={"init_from": moved}), tmp_path / "run")
        run_folder.require_same_mathematics(tmp_path / "run", again)
        # recipe.yaml, which a resumed run writes again, names the weights that it started from.
        assert again.pretrain.init_from == str(source)


def test_a_run_of_before_the_section_is_resumed_and_continued(tiny: Make, tmp_path: Path) -> None:
    keep(tiny(), tmp_path / "run")
    recipe = tmp_path / "run" / run_folder.RECIPE
    earlier = yaml.safe_load(recipe.read_text())
    del earlier["pretrain"], earlier["optim"]["schedule"], earlier["optim"]["decay_share"]
    recipe.write_text(yaml.safe_dump(earlier))
    settled = settle_transfer(tiny(), tmp_path / "run")
    run_folder.require_same_mathematics(tmp_path / "run", settled)
    run_folder.require_resumable(tmp_path / "run", settled)


def test_another_encoder_or_a_missing_source_is_an_error_before_the_start(
    source: Path, tiny: Make, tmp_path: Path
) -> None:
    asked = tiny(model={"size": "S", "patch": [2, 4, 4]}, pretrain={"init_from": str(source)})
    with pytest.raises(UserError, match=r"Add model\.size=tiny,"):
        settle_transfer(asked, tmp_path / "run")
    gone = Pretraining(tiny(pretrain={"init_from": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"there is no .*gone"):
        gone.check_start()


@pytest.mark.dist
def test_further_pretraining_starts_far_below_scratch_and_resumes_without_its_source(
    runs: Runs, demo_shards: Path
) -> None:
    """On other videos and twice the frames; one curve at ZeRO 2 on one rank and 3 on two."""
    size = "model.size=tiny"
    other = (f"data.shards={demo_shards / 'test'}", size, "data.frames=16", "train.max_steps=4")
    learns = (size, "train.total_batch=16", "train.micro_batch=16", "optim.warmup_steps=20")
    runs.run("source", "train.max_steps=120", *learns)
    runs.run("scratch", *other)
    start_from = (*other, f"--init-from={runs.folder / 'source'}", "train.save_every=2")
    first = runs.run("further", *start_from)
    losses, facts = runs.losses("further"), run_folder.read_facts(runs.folder / "further")
    print(f"first loss {losses[0]:.3f}, from scratch {runs.losses('scratch')[0]:.3f}")
    assert losses[0] < 0.6 * runs.losses("scratch")[0]
    initial = facts["initial_weights"]
    assert initial["sha256"] == sha256_of(runs.folder / "source" / run_folder.MODEL)
    assert "\n".join(initial["report"]) in first
    runs.run("further3", *start_from, ranks=2, stage="zero3")
    assert runs.losses("further3") == pytest.approx(losses, rel=1e-4)

    shutil.rmtree(runs.folder / "source")
    shutil.rmtree(newest_checkpoint(runs.folder / "further" / run_folder.CHECKPOINTS).path)  # type: ignore[union-attr]
    resumed = runs.run("further", *start_from)
    assert "going on after step 2" in resumed
    assert "weights of" not in resumed
    assert runs.losses("further") == losses
    assert run_folder.read_facts(runs.folder / "further")["initial_weights"] == initial
