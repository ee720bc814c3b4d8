"""Pretraining on a teacher's features: the targets are its own, and its weights stay outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import compile_model
from arvideo_ds.engine.checkpoints import Checkpoint
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import build_objective, load_trained_encoder
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.models.layouts import to_huggingface
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.planning.advice import Machine, weigh
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.planning.memory import Strategy, footprint, model_states, teacher_bytes
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.tasks.teacher import TEACHER, settle_teacher, teacher_facts
from arvideo_ds.train.preflight import _require_same_teacher
from arvideo_ds.train.report import predictions
from tests.conftest import count_parameters
from tests.engine.test_compile import graphs  # noqa: F401
from tests.tasks.test_devices import HostWaits
from tests.tasks.test_pretrain import baseline_of, batch_of

Make = Callable[..., PretrainRecipe]
SMALL = {"frames": 4, "size": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "arvideo": {"objective": {"cluster": [1, 2, 2]}, "decoder": {"target_ratio": 0.5}},
    "videomae": {"objective": {"name": "videomae", "mask_ratio": 0.75}},
}


@pytest.fixture
def teacher(tiny: Make, tmp_path: Path) -> Path:
    """A finished run on clips of 4 x 16 x 16, with another position table than the student's."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    recipe = tiny(
        model={"positions": "sincos_3d"}, data=SMALL, objective=OBJECTIVES["arvideo"]["objective"]
    )
    torch.manual_seed(7)
    model = build_objective(recipe)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    run_folder.write_recipe(folder, recipe)
    save_file(model.state_dict(), folder / run_folder.MODEL)
    return folder


@pytest.fixture
def taught(tiny: Make, teacher: Path) -> Make:
    """A settled recipe with the teacher; sections as of `tiny`."""

    def make(name: str = "arvideo", **sections: dict[str, Any]) -> PretrainRecipe:
        whole = {"data": SMALL, **OBJECTIVES[name]} | sections
        objective = {"teacher": str(teacher), **whole["objective"]}
        return settle_teacher(tiny(**{**whole, "objective": objective}))

    return make


def aligned(taught: Make, name: str = "arvideo", **sections: dict[str, Any]) -> PretrainRecipe:
    objective = {**OBJECTIVES[name]["objective"], "teacher_tokens": "encoded"}
    return taught(name, **{**OBJECTIVES[name], "objective": objective, **sections})


def noise(count: int, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 4, size, size, 3), dtype=torch.uint8, generator=generator)


def normalized_features(folder: Path, clips: Tensor) -> Tensor:
    """The teacher's features by the functions that evaluate a run, each token normalised."""
    recipe = run_folder.read_recipe(folder, PretrainRecipe)
    with torch.no_grad():
        tokens = encode_clips(load_trained_encoder(recipe, folder), clips, recipe.patch)
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_decoder_that_gives_the_teacher_s_features_has_no_loss(
    name: str, taught: Make, teacher: Path
) -> None:
    """The same tokens in the same order, and the features that the run's own encoder gives."""
    task, batch = Pretrain(taught(name)), batch_of(noise(3), [True, True, False])
    features = normalized_features(teacher, batch.clips)
    asked = []

    def identity(_cubes: Tensor, draw: Any) -> Tensor:
        asked.append(draw.targets)
        rows = [features[clip][draw.targets[clip]] for clip in range(len(features))]
        return torch.stack(rows)

    task.model.predict = identity  # type: ignore[method-assign]
    assert task(batch).item() < 1e-12
    assert 0 < asked[0].shape[1] < task.model.encoder.positions.shape[0]
    features = features.flip(1)
    assert task(batch).item() > 0.1


def test_the_loss_is_smooth_l1(taught: Make) -> None:
    """Half the square below an error of 1, above that the error less a half; as in MVD's code."""
    model = build_objective(taught())
    errors = model.errors(torch.tensor([0.5, -3.0]), torch.zeros(2))
    torch.testing.assert_close(errors, torch.tensor([0.125, 2.5]))


def test_the_baseline_is_the_loss_of_predicting_each_feature_s_mean(
    taught: Make, teacher: Path
) -> None:
    task, batch = Pretrain(taught("videomae")), batch_of(noise(4), [True] * 4)
    targets = task.model.target_values(
        batch.clips, batch.keys, None, normalized_features(teacher, batch.clips)
    )

    def loss_of(constant: Tensor) -> float:
        return task.model.errors(constant.expand_as(targets), targets).mean().item()

    mean = targets.mean(dim=(0, 1))
    assert baseline_of(task, batch) == pytest.approx(loss_of(mean), rel=1e-4)
    for other in (mean + 0.2, mean - 0.2, torch.zeros_like(mean)):
        assert baseline_of(task, batch) < loss_of(other)


def test_the_teacher_s_weights_are_no_part_of_the_module_and_change_none_of_its_own(
    taught: Make, tiny: Make
) -> None:
    torch.manual_seed(0)
    task = Pretrain(taught())
    torch.manual_seed(0)
    plain = Pretrain(tiny(data=SMALL, **OBJECTIVES["arvideo"]))
    assert list(task.state_dict()) == list(plain.state_dict())
    assert count_parameters(task.model.encoder) == count_parameters(plain.model.encoder)
    for name, value in plain.model.encoder.state_dict().items():
        assert torch.equal(task.model.encoder.state_dict()[name], value)
    assert task.teacher is not None
    before = {n: v.clone() for n, v in task.teacher.model.state_dict().items()}
    task(batch_of(noise(2), [True, True])).backward()
    task.train()
    assert not task.teacher.model.training
    assert all(p.grad is None for p in task.teacher.model.parameters())
    assert all(p.grad is not None for p in task.parameters())
    assert all(torch.equal(before[n], v) for n, v in task.teacher.model.state_dict().items())


def require_precision_without_waits(task: Any, batch: Batch, precision: str) -> None:
    """Of a task with a teacher, on the device `meta`."""
    dtype, device = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], torch.device("meta")
    task, batch = task.to(device, dtype), batch.to(device)
    task(batch)  # the teacher moves once
    with HostWaits() as waits:
        task(batch).backward()
    assert not waits.found
    assert {p.dtype for p in task.teacher.model.parameters()} == {dtype}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_is_in_the_run_s_precision_and_never_makes_the_host_wait(
    precision: str, taught: Make
) -> None:
    train = {"max_steps": 2, "total_batch": 2, "micro_batch": 2, "precision": precision}
    require_precision_without_waits(
        Pretrain(taught(train=train)), batch_of(noise(2), [True, True]), precision
    )


def test_teacher_and_student_are_two_graphs_for_all_steps(
    taught: Make,
    graphs: CompileCounter,  # noqa: F811
) -> None:
    task, batch = Pretrain(taught()), batch_of(noise(2), [True, True])
    expected = task(batch)
    compile_model(task, layers=False)
    torch.testing.assert_close(task(batch), expected)
    batch.keys += 9
    task(batch).backward()
    task.baseline(batch)
    assert graphs.frame_count == 2


def test_positions_are_interpolated_for_clips_of_another_shape(taught: Make) -> None:
    recipe = taught(data={"frames": 4, "size": 24})
    task = Pretrain(recipe)
    assert recipe.objective.teacher_clip == (4, 16, 16)
    assert task.teacher is not None
    wanted = interpolated_positions("sincos_3d", (2, 4, 4), (2, 6, 6), 128)
    assert torch.equal(task.teacher.model.positions, wanted)
    assert torch.isfinite(task(batch_of(noise(2, 24), [True, True])))


def test_the_recipe_alone_rebuilds_the_model(taught: Make, teacher: Path, tmp_path: Path) -> None:
    """Reports, probes and exports of a run need no teacher."""
    recipe, folder = taught(), tmp_path / "run"
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    for file in teacher.iterdir():
        file.unlink()
    again = run_folder.read_recipe(folder, PretrainRecipe)
    run_folder.require_same_mathematics(folder, again)
    assert build_objective(again).decoder.head.out_features == 128  # type: ignore[union-attr]
    assert "features of its teacher instead of pixels" in predictions(folder, again, None, 1).note


def test_a_run_s_other_teacher_is_refused_and_a_moved_one_is_not(
    taught: Make, teacher: Path, tiny: Make, tmp_path: Path
) -> None:
    recipe, folder = taught(), tmp_path / "run"
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    checkpoint = Checkpoint(folder, 1, json.loads(json.dumps(teacher_facts(recipe))))
    moved = teacher.rename(tmp_path / "moved")
    objective = recipe.objective.model_copy(update={"teacher": str(moved)})
    now = recipe.model_copy(update={"objective": objective})
    run_folder.require_same_mathematics(folder, now)
    _require_same_teacher(checkpoint, teacher_facts(now))
    with pytest.raises(UserError, match=r"trained with another teacher"):
        _require_same_teacher(checkpoint, {TEACHER: {"sha256": "0" * 64}})
    with pytest.raises(UserError, match=r"objective\.teacher_size was 'tiny', is None"):
        run_folder.require_same_mathematics(folder, tiny(data=SMALL, **OBJECTIVES["arvideo"]))
    assert teacher_facts(tiny()) == {}


def test_a_folder_of_transformers_gives_its_size_and_clip(
    tiny: Make, teacher: Path, tmp_path: Path
) -> None:
    source = run_folder.read_recipe(teacher, PretrainRecipe)
    encoder = load_trained_encoder(source, teacher)
    folder = tmp_path / "public"
    folder.mkdir()
    state = to_huggingface(encoder.state_dict(), source.patch)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    facts = {"num_frames": 4, "image_size": 16, "hidden_size": 128, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(facts))
    objective = {"name": "videomae", "teacher": str(folder)}
    recipe = settle_teacher(tiny(data=SMALL, objective=objective))
    assert (recipe.objective.teacher_size, recipe.objective.teacher_clip) == ("tiny", (4, 16, 16))
    assert torch.isfinite(Pretrain(recipe)(batch_of(noise(2), [True, True])))


def test_what_cannot_teach_is_refused_with_the_reason(
    taught: Make, tiny: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"cubes of \[2, 4, 4\].*Set model\.patch=\[2, 4, 4\]"):
        taught(model={"patch": [2, 8, 8]}, objective={"cluster": [1, 1, 1]})
    public = {"teacher": str(tmp_path / "vit.pth")}
    with pytest.raises(UserError, match=r"teacher_clip=\[FRAMES,HEIGHT,WIDTH\]"):
        settle_teacher(tiny(objective=public))
    clip = {"teacher_clip": [16, 224, 224]}
    with pytest.raises(UserError, match=r"Set objective\.teacher_size"):
        settle_teacher(tiny(objective=public | clip))
    given = settle_teacher(tiny(objective=public | clip | {"teacher_size": "S"}))
    with pytest.raises(UserError, match=r"there is no .*vit\.pth"):
        Pretrain(given)
    with pytest.raises(UserError, match=r"not a multiple of model\.patch"):
        settle_teacher(tiny(objective=public | {"teacher_size": "S", "teacher_clip": [16, 30, 32]}))
    with pytest.raises(UserError, match=r"teacher_size=XXL is not one of nano, tiny, S"):
        tiny(objective=public | {"teacher_size": "XXL"})
    with pytest.raises(UserError, match=r"describe a teacher"):
        tiny(objective={"teacher_size": "S"})
    with pytest.raises(UserError, match=r"not for lvmae"):
        tiny(objective={"name": "lvmae", **public})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_with_the_teacher_s_weights_is_aligned(
    name: str, taught: Make, teacher: Path
) -> None:
    """It sees the same tokens under the same mask; then normalised features have no loss."""
    task = Pretrain(aligned(taught, name, model={"positions": "sincos_3d"}))
    assert task.teacher is not None
    task.model.encoder.load_state_dict(task.teacher.model.state_dict())
    head = task.model.decoder.head
    assert isinstance(head, nn.Linear)
    nn.init.eye_(head.weight)
    batch = batch_of(noise(3), [True, True, False])
    seen: list[Tensor] = []
    task.teacher.model.register_forward_hook(lambda _m, args, _o: seen.append(args[1]))
    head.register_forward_hook(lambda _m, _a, out: nn.functional.layer_norm(out, out.shape[-1:]))
    assert task(batch).item() < 1e-9
    assert torch.equal(seen[0], task.model.draw(batch.keys).encoded)
    task.model.encoder.norm.weight.data[0] += 1
    assert task(batch).item() > 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_alignment_has_no_decoder_and_its_cost_is_counted(name: str, taught: Make) -> None:
    train = {"max_steps": 2, "total_batch": 2, "micro_batch": 2, "precision": "fp32"}
    recipe = aligned(taught, name, train=train)
    task, batch, cost = Pretrain(recipe), batch_of(noise(2), [True, True]), cost_of(recipe)
    assert [n for n, _ in task.model.decoder.named_parameters()] == ["head.weight", "head.bias"]
    assert count_parameters(task) == cost.parameters_encoder + cost.parameters_decoder
    with FlopCounterMode(display=False) as counted:
        task(batch)
    total = cost.flops_forward_per_clip + cost.flops_teacher_per_clip
    assert counted.get_total_flops() == 2 * total
    predicting = cost_of(taught(name))
    assert cost.flops_teacher_per_clip < predicting.flops_teacher_per_clip
    assert cost.flops_forward_per_clip < predicting.flops_forward_per_clip
    memory = [footprint(r, Strategy(stage=1), 1, 64, 1).peak for r in (recipe, taught(name))]
    assert memory[0] < memory[1]
    plan = make_plan(recipe, world_size=1)
    assert plan.decoder_queries == plan.encoder_tokens


def test_aligned_student_and_teacher_are_two_graphs(
    taught: Make,
    graphs: CompileCounter,  # noqa: F811
) -> None:
    task, batch = Pretrain(aligned(taught)), batch_of(noise(2), [True, True])
    expected = task(batch)
    compile_model(task, layers=False)
    torch.testing.assert_close(task(batch), expected)
    batch.keys += 9
    task(batch).backward()
    assert task.baseline(batch)[0] > 0
    assert graphs.frame_count == 2


def test_alignment_with_the_run_s_own_average_or_without_a_teacher_is_refused(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"compare the encoder's output with itself"):
        tiny(objective={"teacher": "ema", "teacher_tokens": "encoded"})
    with pytest.raises(UserError, match=r"objective\.teacher_tokens describe a teacher"):
        tiny(objective={"teacher_tokens": "encoded"})


def test_an_ema_teacher_is_the_run_s_own_encoder(tiny: Make) -> None:
    """Its average is kept, planned and saved like fine-tuning's; nothing outside the run counts."""
    given = {"teacher": "ema", **OBJECTIVES["arvideo"]["objective"]}
    recipe = settle_teacher(tiny(data=SMALL, objective=given))
    plain = tiny(data=SMALL, objective=OBJECTIVES["arvideo"]["objective"])
    assert (recipe.ema_decay, plain.ema_decay) == (0.999, None)
    assert recipe.objective.teacher_size == "tiny"
    assert teacher_facts(recipe) == {}
    task = Pretrain(recipe)
    own = dict(task.named_parameters())
    assert {n: w.shape for n, w in task.followers().items()} == {
        n: own[n].shape for n in own if n.startswith("model.encoder.")
    }
    assert torch.isfinite(task(batch_of(noise(2), [True, True])))
    kept, without = (model_states(r, Strategy(stage=2), world_size=1) for r in (recipe, plain))
    assert kept.optimizer > without.optimizer
    with pytest.raises(UserError, match=r"teacher_decay is for objective\.teacher: ema"):
        tiny(objective={"teacher_decay": 0.9})


def test_plan_and_memory_count_the_teacher(taught: Make, tiny: Make) -> None:
    """One forward pass of whole clips, weights in the run's precision, nothing in the optimiser."""
    recipe = taught(train={"max_steps": 2, "total_batch": 8, "micro_batch": 8, "precision": "bf16"})
    task = Pretrain(recipe)
    assert task.teacher is not None
    with FlopCounterMode(display=False) as counted:
        task.features(noise(2))
    assert counted.get_total_flops() == 2 * cost_of(recipe).flops_teacher_per_clip
    weights = sum(p.numel() * p.element_size() for p in task.teacher.model.parameters())
    assert teacher_bytes(recipe) == weights
    plan = make_plan(recipe, world_size=1)
    assert plan.as_dict()["gflops_teacher_per_clip"] == pytest.approx(
        cost_of(recipe).flops_teacher_per_clip / 1e9, abs=1e-3
    )
    assert "gflops_teacher_per_clip" not in make_plan(tiny(), world_size=1).as_dict()
    pixels = recipe.model_copy(
        update={
            "objective": recipe.objective.model_copy(
                update={"teacher": None, "teacher_size": None, "teacher_clip": None}
            )
        }
    )
    for stage in range(1, 4):
        with_, without = (footprint(r, Strategy(stage=stage), 2, 4, 1) for r in (recipe, pixels))
        assert with_.update - without.update >= weights
        assert with_.forward - without.forward >= weights
        machine = Machine(1, 80.0, 100.0, 20.0)
        seconds = [weigh(r, Strategy(stage=stage), 8, machine).compute_s for r in (recipe, pixels)]
        assert seconds[0] > seconds[1]
