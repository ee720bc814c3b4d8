"""Fine-tuning on the class scores of a teacher: what is learnt, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.ablation.judges import Testing
from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import compile_model
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import load_classifier
from arvideo_ds.files.tensors import load_tensors, save_tensors
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.layouts import to_videomae
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.planning.memory import Strategy, footprint, teacher_bytes
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.specs.finetune import Finetuning
from arvideo_ds.tasks.teacher import settle_teacher, teacher_facts
from tests.engine.test_compile import graphs  # noqa: F401
from tests.tasks.test_teacher import require_precision_without_waits

Make = Callable[..., FinetuneRecipe]
NAMES = ["bend", "jack", "walk", "wave", "run"]
SMALL = {"frames": 4, "size": 16}
# Cubes of another size than the student's.
WIDE = {"size": "tiny", "patch": [2, 8, 8]}
PLAIN: dict[str, Any] = {"mixup": 0, "cutmix": 0, "drop_path": 0}


def trained(folder: Path, recipe: FinetuneRecipe, names: Any = NAMES) -> Path:
    """The folder of a finished run with random weights, those of the head and norms included."""
    folder.mkdir()
    count = sum(map(len, names.values())) if isinstance(names, dict) else len(names)
    torch.manual_seed(7)
    model = Classifier(recipe.encoder, count, pooling=recipe.pooling)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    run_folder.write_recipe(folder, recipe)
    (folder / run_folder.LABELS).write_text(json.dumps(names))
    save_tensors(model.state_dict(), folder / run_folder.MODEL)
    return folder


@pytest.fixture
def teacher(tiny_finetune: Make, tmp_path: Path) -> Path:
    return trained(tmp_path / "teacher", tiny_finetune(model=WIDE, data=SMALL))


@pytest.fixture
def taught(tiny_finetune: Make, teacher: Path) -> Make:
    """A settled recipe of a nano student with the teacher; sections as of `tiny_finetune`."""

    def make(**sections: dict[str, Any]) -> FinetuneRecipe:
        own = {"model": {"size": "nano"}, "data": SMALL} | sections
        own["finetune"] = {**PLAIN, "teacher": str(teacher)} | sections.get("finetune", {})
        return settle_teacher(tiny_finetune(**own))

    return make


def batch_of(count: int = 4, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(3)
    clips = torch.randint(0, 256, (count, 4, size, size, 3), generator=generator)
    labels, valid = torch.arange(count) % len(NAMES), torch.ones(count, dtype=torch.bool)
    return Batch(clips.to(torch.uint8), torch.arange(count) + 7, labels, valid, first_key=7)


def student_of(recipe: FinetuneRecipe, *counts: int) -> Finetune:
    torch.manual_seed(0)
    task = Finetune(recipe, *(counts or (len(NAMES),)))
    torch.nn.init.normal_(task.model.head.weight)
    return task


def scores_of(folder: Path, clips: Tensor) -> Tensor:
    """Logits by the functions that test a run."""
    recipe = run_folder.read_recipe(folder, FinetuneRecipe)
    with torch.no_grad():
        return load_classifier(recipe, folder)[0](clips)


def shards(names: Any = NAMES) -> Any:
    manifest = SimpleNamespace(class_names=lambda heads: names)
    return SimpleNamespace(name="SHARDS", manifest=manifest)


def check(recipe: FinetuneRecipe, names: Any = NAMES) -> None:
    Finetuning(recipe).check(make_plan(recipe, world_size=1), shards(names), None)


@pytest.mark.parametrize(("share", "temperature"), [(0.5, 1.0), (0.3, 2.0), (1.0, 4.0)])
def test_the_loss_is_cross_entropy_and_divergence_in_their_shares(
    share: float, temperature: float, taught: Make, teacher: Path
) -> None:
    """By hand: sum over classes of p (log p - log q), times the temperature's square."""
    settings = {"teacher_weight": share, "teacher_temperature": temperature}
    task, batch = student_of(taught(finetune=settings)), batch_of()
    batch.valid[1] = False
    scores = task.model(batch.clips)
    p = torch.softmax(scores_of(teacher, batch.clips) / temperature, dim=1)
    q = torch.softmax(scores / temperature, dim=1)
    apart = temperature**2 * (p * (p / q).log()).sum(1)
    entropy = torch.nn.functional.cross_entropy(
        scores, batch.labels, label_smoothing=0.1, reduction="none"
    )
    expected = ((1 - share) * entropy + share * apart)[batch.valid].mean()
    torch.testing.assert_close(task(batch), expected)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(
    pooling: str, tiny_finetune: Make, taught: Make, tmp_path: Path
) -> None:
    own = {"model": WIDE, "data": SMALL, "finetune": PLAIN | {"pooling": pooling}}
    folder = trained(tmp_path / "equal", tiny_finetune(**own))
    own["finetune"] |= {"teacher": str(folder), "teacher_weight": 1, "teacher_temperature": 3}
    task = student_of(taught(**own))
    state = load_tensors(folder / run_folder.MODEL)
    task.model.load_state_dict(state)
    loss = task(batch_of())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    gradients = [p.grad.abs().max() for p in task.parameters() if p.grad is not None]
    assert gradients and max(gradients) < 1e-5
    task.model.head.bias.data[0] += 1
    assert task(batch_of()).item() > 0.01


def test_each_label_set_has_a_divergence_of_its_own(
    tiny_finetune: Make, taught: Make, tmp_path: Path
) -> None:
    heads = {"heads": ["verb", "noun"]}
    names = {"verb": NAMES[:3], "noun": NAMES[3:]}
    folder = trained(tmp_path / "two", tiny_finetune(data=SMALL, finetune=heads), names)
    settings = heads | {"teacher": str(folder), "teacher_weight": 1}
    recipe = taught(finetune=settings)
    check(recipe, names)
    task, batch = student_of(recipe, 3, 2), batch_of()
    batch.labels = torch.zeros(4, 2, dtype=torch.long)
    ours, theirs = task.model(batch.clips), scores_of(folder, batch.clips)
    expected = 0.0
    for rows in (slice(0, 3), slice(3, 5)):
        p, q = (scores[:, rows].softmax(1) for scores in (theirs, ours))
        expected += (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(task(batch), expected)
    with pytest.raises(UserError, match=r"label sets \['verb', 'noun'\].*in place of \['noun', "):
        check(
            taught(finetune=settings | {"heads": ["noun", "verb"]}), dict(reversed(names.items()))
        )


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_the_teacher_sees_the_mixed_clip_of_the_student(
    mixing: dict[str, float], taught: Make, tiny_finetune: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, where the student sees a part; the mixing is that of a run without a teacher."""
    settings = PLAIN | mixing | {"drop_tokens": 0.25}
    plain = tiny_finetune(model={"size": "nano"}, data=SMALL, finetune=settings)
    task, batch = student_of(taught(finetune=settings)), batch_of()
    seen = {}

    def keep(module: Finetune, name: str) -> None:
        encode = module.model if name != "teacher" else module.teacher.model  # type: ignore[union-attr]
        forward = encode.forward

        def spy(clips: Tensor, tokens: Tensor | None = None, **views: Any) -> Tensor:
            seen[name] = clips.clone(), tokens
            return forward(clips, tokens, **views)

        monkeypatch.setattr(encode, "forward", spy)

    for module, name in ((task, "student"), (task, "teacher"), (student_of(plain), "alone")):
        keep(module, name)
        if name != "student":
            module(batch)
    assert torch.equal(seen["teacher"][0], seen["student"][0])
    assert torch.equal(seen["alone"][0], seen["student"][0])
    assert not torch.equal(seen["student"][0], batch.clips / 255)
    assert seen["teacher"][1] is None and seen["student"][1] is not None


def test_the_teacher_s_weights_are_no_part_of_the_module_and_change_none_of_its_own(
    taught: Make, tiny_finetune: Make
) -> None:
    plain = student_of(tiny_finetune(model={"size": "nano"}, data=SMALL, finetune=PLAIN))
    task = student_of(taught())
    state = task.state_dict()
    assert list(state) == list(plain.state_dict())
    encoder = {name for name in state if ".encoder." in name}
    assert all(torch.equal(state[name], plain.state_dict()[name]) for name in encoder)
    assert task.teacher is not None
    theirs = task.teacher.model
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.train()(batch_of()).backward()
    optimizer.step()
    assert not theirs.training
    assert all(p.grad is None for p in theirs.parameters())
    assert all(torch.equal(before[n], value) for n, value in theirs.state_dict().items())
    assert task.eval()(batch_of()).shape == (4, len(NAMES))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_is_in_the_run_s_precision_and_never_makes_the_host_wait(
    precision: str, taught: Make
) -> None:
    train = {"max_steps": 2, "total_batch": 4, "micro_batch": 4, "precision": precision}
    require_precision_without_waits(student_of(taught(train=train)), batch_of(), precision)


def test_teacher_and_student_are_two_graphs_for_all_steps(taught: Make, graphs: Any) -> None:  # noqa: F811
    task, batch = student_of(taught()), batch_of()
    expected = task(batch)
    compile_model(task, layers=False)
    torch.testing.assert_close(task(batch), expected)
    task(batch).backward()
    assert graphs.frame_count == 2


def test_the_recipe_records_the_teacher_s_shape_and_alone_rebuilds_the_model(
    taught: Make, teacher: Path, tmp_path: Path
) -> None:
    """With positions interpolated for clips of another shape; a teacher may move."""
    recipe, folder = taught(data={"frames": 4, "size": 24}), tmp_path / "run"
    settings = recipe.finetune
    shape = settings.teacher_size, settings.teacher_patch, settings.teacher_clip
    assert shape == ("tiny", (2, 8, 8), (4, 16, 16))
    task = student_of(recipe)
    assert task.teacher is not None
    wanted = interpolated_positions("sincos_1d", (2, 2, 2), (2, 3, 3), 128)
    assert torch.equal(task.teacher.model.encoder.positions, wanted)
    assert torch.isfinite(task(batch_of(size=24)))
    trained(folder, recipe)
    moved = teacher.rename(tmp_path / "moved")
    assert load_classifier(run_folder.read_recipe(folder, FinetuneRecipe), folder)
    now = taught(data={"frames": 4, "size": 24}, finetune={"teacher": str(moved)})
    run_folder.require_same_mathematics(folder, now)
    assert teacher_facts(now)["teacher"]["origin"] == str(moved)
    assert Testing().sources(now)["teacher"] == teacher_facts(now)["teacher"]["sha256"]
    changed = taught(
        data={"frames": 4, "size": 24}, finetune={"teacher": str(moved), "teacher_weight": 1}
    )
    with pytest.raises(UserError, match=r"finetune\.teacher_weight was 0\.5, is 1\.0"):
        run_folder.require_same_mathematics(folder, changed)


def test_a_public_classifier_gives_the_scores_of_the_run_that_it_came_from(
    taught: Make, tiny_finetune: Make, tmp_path: Path
) -> None:
    """A file with VideoMAE's names, which gives neither size, clip nor names of classes."""
    folder = trained(tmp_path / "run", tiny_finetune(data=SMALL))
    state = load_tensors(folder / run_folder.MODEL)
    encoder = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
    for name, value in encoder.items():
        if name.endswith("qkv.bias"):  # VideoMAE has none of keys
            value[128:256] = 0
    public = to_videomae(encoder, (2, 4, 4))
    public |= {f"fc_norm.{n}": state[f"norm.{n}"] for n in ("weight", "bias")}
    public |= {f"head.{n}": state[f"head.{n}"] for n in ("weight", "bias")}
    file = tmp_path / "public.pth"
    torch.save({"model": public}, file)
    given = {"teacher": str(file), "teacher_size": "tiny", "teacher_clip": [4, 16, 16]}
    recipe = taught(finetune=given)
    check(recipe)
    task = student_of(recipe)
    clips = batch_of().clips
    torch.testing.assert_close(task.taught_scores(clips), scores_of(folder, clips))
    with pytest.raises(UserError, match=r"does not score the 4 classes of the shards: head\."):
        student_of(recipe, 4)
    torch.save({"model": {n: v for n, v in public.items() if not n.startswith("head.")}}, file)
    with pytest.raises(UserError, match=r"does not score the 5 classes"):
        student_of(recipe)
    with pytest.raises(
        UserError, match=r"shape finetune\.teacher_size and finetune\.teacher_patch"
    ):
        student_of(taught(finetune=given | {"teacher_size": "nano"}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*NAMES[:4], "skip"], r"finetune\.teacher=.*different labels \(5 and 5; 'skip' only in S"),
        (NAMES[:4], r"different labels \(4 and 5; 'run' only in finetune\.teacher="),
        (NAMES[::-1], r"different labels \(5 and 5; in another order"),
    ],
)
def test_a_teacher_of_other_classes_is_refused_before_any_work(
    names: list[str], message: str, taught: Make
) -> None:
    check(taught())
    with pytest.raises(UserError, match=message):
        check(taught(), names)


def test_what_cannot_teach_is_refused_with_the_reason(
    taught: Make,
    tiny_finetune: Make,
    tiny: Callable[..., PretrainRecipe],
    teacher: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"teacher=ema: a moving average teaches pretraining only"):
        tiny_finetune(finetune={"teacher": "ema"})
    with pytest.raises(UserError, match=r"finetune\.teacher_weight describe a teacher"):
        tiny_finetune(finetune={"teacher_weight": 0.9})
    with pytest.raises(UserError, match=r"cubes of \[2, 8, 8\].*do not divide .*\[4, 20, 20\]"):
        taught(data={"frames": 4, "size": 20})
    run_folder.write_recipe(teacher, tiny(data=SMALL, objective={"cluster": [1, 1, 1]}))
    with pytest.raises(UserError, match=r"a pretraining run, which has no class scores"):
        taught()
    public = {"teacher": str(tmp_path / "vit.pth")}
    with pytest.raises(UserError, match=r"finetune\.teacher_clip=\[FRAMES,HEIGHT,WIDTH\]"):
        taught(finetune=public)
    with pytest.raises(UserError, match=r"Set finetune\.teacher_size"):
        taught(finetune=public | {"teacher_clip": [4, 16, 16]})
    odd = {"teacher_size": "tiny", "teacher_clip": [4, 30, 32]}
    with pytest.raises(UserError, match=r"not a multiple of finetune\.teacher_patch=\[2, 4, 4\]"):
        taught(finetune=public | odd)


def test_plan_and_memory_count_the_teacher(taught: Make, tiny_finetune: Make) -> None:
    """One forward pass of whole clips, weights in the run's precision, nothing in the optimiser."""
    train = {"max_steps": 2, "total_batch": 8, "micro_batch": 8, "precision": "bf16"}
    recipe = taught(train=train, finetune={"drop_tokens": 0.5})
    plain = tiny_finetune(
        model={"size": "nano"}, data=SMALL, train=train, finetune=PLAIN | {"drop_tokens": 0.5}
    )
    task, cost = student_of(recipe), cost_of(recipe)
    assert task.teacher is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        task.taught_scores(batch_of(2).clips)
    head = 2 * 128 * len(NAMES)
    assert counted.get_total_flops() == 2 * (cost.flops_teacher_per_clip + head)
    theirs = task.teacher.model
    # A linear head is too small to count; the norm of the pooled tokens is the encoder's.
    kept = [p for name, p in theirs.named_parameters() if not name.startswith("head.")]
    assert teacher_bytes(recipe) == sum(p.numel() * p.element_size() for p in kept)
    plan, without = (make_plan(r, world_size=1) for r in (recipe, plain))
    assert plan.as_dict()["gflops_teacher_per_clip"] == pytest.approx(
        cost.flops_teacher_per_clip / 1e9, abs=1e-3
    )
    assert plan.gflops_forward_per_clip == without.gflops_forward_per_clip
    assert "gflops_teacher_per_clip" not in without.as_dict()
    for stage in range(1, 4):
        with_, less = (footprint(r, Strategy(stage=stage), 2, 4, 1) for r in (recipe, plain))
        assert with_.update - less.update >= teacher_bytes(recipe)
        assert with_.forward - less.forward >= teacher_bytes(recipe)
