"""The examples of docs/extending.md, as files outside the package: they plan, train and resume."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.errors import UserError
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.planning.memory import Strategy, footprint
from arvideo_ds.registry import PLUGINS
from arvideo_ds.tasks.pretrain import build_objective
from tests import warm_start
from tests.conftest import ROOT, command_environment, count_parameters
from tests.train.conftest import LOSS, metrics_of

PAGE = (ROOT / "docs" / "extending.md").read_text()
# Name of the file -> its text.
EXAMPLES = {
    name: text for text, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, flags=re.S)
}
CHOICES = ("objective.name=future", "optim.name=lion", "model.name=learned", "model.size=micro")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    return os.pathsep.join(str(folder / name) for name in EXAMPLES)


@pytest.fixture
def recipe(plugins: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretrainRecipe]:
    monkeypatch.setenv(PLUGINS, plugins)
    yield load_recipe("demo", CHOICES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_counts_the_lines_of_its_examples(name: str) -> None:
    rows = dict(re.findall(r"^\| (\w+) \| 1 \| (\d+) \|", PAGE, flags=re.M))
    kinds = {"future.py": "objective", "lion.py": "optimiser", "learned.py": "backbone"}
    lines = [line for line in EXAMPLES[name].splitlines() if line.strip()]
    assert len(lines) == int(rows[kinds[name]]) <= 80


def test_without_its_plugin_an_example_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGINS, raising=False)
    for choice in ("objective.name=futur", "model.name=learnd"):
        with pytest.raises(UserError, match=f"{choice} is not a known .*{PLUGINS}=FILE"):
            load_recipe("demo", [choice])


def test_costs_and_memory_of_an_objective_follow_from_its_settings(recipe: PretrainRecipe) -> None:
    model, cost = build_objective(recipe), cost_of(recipe)
    learned = model.encoder.positions.numel()
    assert count_parameters(model.encoder) == cost.parameters_encoder + learned
    assert count_parameters(model.decoder) == cost.parameters_decoder
    tokens = recipe.geometry.num_tokens
    assert (recipe.counts.encoded, recipe.counts.predicted) == (tokens // 2, tokens // 2)
    less = recipe.model_copy(
        update={"objective": recipe.objective.model_copy(update={"seen_times": 1})}
    )
    kinds = {"world_size": 1, "micro_batch": 8, "accumulation": 1}
    assert cost_of(less).flops_forward_per_clip < cost.flops_forward_per_clip
    assert footprint(less, Strategy(), **kinds).peak < footprint(recipe, Strategy(), **kinds).peak


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.seen_times=4", "leaves nothing to predict"),
        ("objective.seen_times=x", "objective.seen_times='x': must be a whole number"),
        ("objective.seen_time=1", "did you mean 'objective.seen_times'"),
        ("objective.cluster=[2,4,4]", "is not a setting of objective.name=future"),
        ("model.size=B", "model.name=learned has the sizes micro"),
    ],
)
def test_settings_of_an_example_are_checked_as_the_projects_own(
    recipe: PretrainRecipe, override: str, words: str
) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe("demo", [*CHOICES, override])
    assert words in str(raised.value)


def test_an_optimiser_of_a_plugin_gets_groups_and_settings(recipe: PretrainRecipe) -> None:
    groups = parameter_groups(build_objective(recipe), 0.05)
    made = OPTIMIZERS["lion"](groups, OptimSettings(name="lion", betas=(0.9, 0.99)))
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 0.05}
    assert all(group["betas"] == (0.9, 0.99) for group in made.param_groups)


@pytest.mark.slow
def test_an_objective_an_optimiser_and_a_backbone_train_and_resume(
    plugins: str, demo_shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [
        f"{ROOT}/scripts/pretrain.py",
        f"--deepspeed_config={ROOT}/ds_configs/zero2.json",
        f"--output={output}",
        "--recipe=demo",
        *CHOICES,
        f"data.shards={demo_shards / 'train'}",
        *("data.num_streams=12", "data.workers=1", "optim.base_lr=4e-3", "optim.warmup_steps=2"),
        *("train.max_steps=8", "train.total_batch=16", "train.micro_batch=16"),
        *("train.log_every=1", "train.save_every=4"),
    ]

    def losses() -> dict[int, float]:
        process = warm_start.start(
            command, cwd=tmp_path, env=command_environment(**{PLUGINS: plugins}), ranks=1
        )
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text
        return {line["step"]: line[LOSS] for line in metrics_of(output)}

    whole = losses()
    assert whole[8] < whole[1]
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    (output / "metrics.jsonl").unlink()
    assert losses() == {step: whole[step] for step in (5, 6, 7, 8)}
