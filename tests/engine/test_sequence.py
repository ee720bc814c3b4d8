"""Ranks that share the tokens of their clips compute what one rank computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, TokenizerRecipe
from arvideo_ds.engine.saved_state import SavedState
from arvideo_ds.errors import UserError
from arvideo_ds.train.settle import RunOptions, RunSettings, settle
from tests.conftest import run_script

Curves = dict[str, list[float]]
ONE = "1-of-1"
# Ranks that share tokens, and four that go on from those that did.
SHARED = ["2-of-2", "2-of-4", "4-of-4", "1-of-4"]
NUM_CASES = {groups: 10 if groups in SHARED[:3] else 1 for groups in SHARED}


def values(checkpoint: Path, kind: str) -> list[Tensor]:
    saved = SavedState(checkpoint)
    return [
        saved.read(name, kind, 0, shape[0] * (shape[1] if len(shape) > 1 else 1))
        for name, shape in saved.shapes.items()
    ]


def largest_difference(left: Path, right: Path, kind: str) -> float:
    """Of a parameter's values, relative to its largest one; then over all parameters."""
    pairs = list(zip(values(left, kind), values(right, kind), strict=True))
    # Gradients that are 0 but for rounding (keys' biases) are compared with the others' size.
    floor = 1e-2 * max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in pairs)


def distance(left: Path, right: Path, kind: str) -> float:
    """Of all parameters as one vector, relative to its length."""
    a, b = (torch.cat(values(path, kind)) for path in (left, right))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def curves(folder: Path) -> Curves:
    return run_cases(folder)


def run_cases(folder: Path, *ranks: str, **environment: str) -> Curves:
    script = Path(__file__).with_name("sequence.py")
    done = run_script(script, folder, *ranks, timeout=1800, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(folder.glob("curves-*.json"))
    return {name: curve for file in files for name, curve in json.loads(file.read_text()).items()}


@pytest.mark.dist
@pytest.mark.parametrize("groups", SHARED)
def test_losses_are_those_of_one_rank(groups: str, curves: Curves) -> None:
    found = {name: c for name, c in curves.items() if name.startswith(groups)}
    assert len(found) == NUM_CASES[groups]
    for name, curve in found.items():
        one = curves[name.replace(groups, ONE)][-len(curve) :]
        assert curve == pytest.approx(one, rel=1e-5), name


@pytest.mark.dist
@pytest.mark.parametrize("groups", SHARED)
def test_gradients_and_weights_are_those_of_one_rank(
    groups: str, curves: Curves, folder: Path
) -> None:
    assert curves
    for path in sorted((folder / groups).glob("*/step-*")):
        one = folder / ONE / path.parent.name / path.name
        # After the first step AdamW's first moment is a tenth of the gradient.
        assert largest_difference(path, one, "exp_avg") <= 1e-4, path
        # Not each by itself: of a gradient that is rounding AdamW makes a step as of any other.
        assert distance(path, one, "weight") <= 1e-4, path


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_keeps_what_the_adviser_says(ranks: int, curves: Curves, folder: Path) -> None:
    assert curves
    for name, (kept, predicted) in json.loads((folder / f"kept-{ranks}.json").read_text()).items():
        assert predicted == pytest.approx(kept, rel=0.05), name


@pytest.mark.parametrize(
    ("recipe", "kind", "size", "ranks", "overrides", "said"),
    [
        ("lvmae_vit_b_epic", PretrainRecipe, 2, 3, [], "3 rank(s) cannot form whole groups of"),
        ("lvmae_vit_b_epic", PretrainRecipe, 8, 8, [], "has 12. Use one of 1, 2, 3, 4, 6, 12"),
        ("lvmae_vit_b_epic", PretrainRecipe, 2, 2, ["train.compile=true"], "may lose gradients"),
        ("finetune_vit_b_epic_128f", FinetuneRecipe, 5, 5, [], "model.size=B has 12"),
        ("tokenizer_b_k600", TokenizerRecipe, 2, 2, [], "not for task=tokenizer"),
    ],
)
def test_what_cannot_be_shared_is_said_before_a_run_begins(
    recipe: str,
    kind: type[Recipe],
    size: int,
    ranks: int,
    overrides: list[str],
    said: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="sequence_parallel_size") as refused:
        settled(recipe, kind, size, ranks, overrides, tmp_path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("lvmae_vit_b_epic", PretrainRecipe), ("finetune_vit_b_epic_128f", FinetuneRecipe)],
)
def test_long_clips_are_dealt_to_groups_of_ranks(
    recipe: str, kind: type[Recipe], tmp_path: Path
) -> None:
    plan = settled(recipe, kind, 4, 8, [], tmp_path).plan
    assert (plan.sequence_parallel, plan.data_ranks) == (4, 2)
    assert plan.micro_batch * plan.accumulation * plan.data_ranks == plan.total_batch


def settled(
    recipe: str, kind: type[Recipe], size: int, ranks: int, overrides: list[str], folder: Path
) -> RunSettings[Recipe]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"sequence_parallel_size": size}))
    given = [*overrides, "data.num_videos=1000", "data.num_streams=120"]
    return settle(RunOptions(recipe, path, given, folder / "run"), kind, world_size=ranks)


@pytest.mark.gpu
def test_two_gpus_share_tokens_as_two_cpus_do(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA GPUs")
    found = run_cases(tmp_path, "2", DS_ACCELERATOR="cuda")
    assert len(found) == 2 * NUM_CASES["2-of-2"]
    for name, curve in found.items():
        one = found[name.replace("2-of-2", ONE)][-len(curve) :]
        assert curve == pytest.approx(one, rel=1e-4), name
