"""Grids: read strictly, every row a recipe, equal rows run once, and the paper's tables whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from arvideo_ds.ablation.cell import cells_of
from arvideo_ds.ablation.grid import UNTRAINED, grid_names, read_grid, resolve
from arvideo_ds.config import FinetuneRecipe, load_recipe, recipe_names
from arvideo_ds.errors import UserError
from arvideo_ds.planning.cost import cost_of

ROWS = [{"name": "small", "overrides": ["objective.cluster=[1,8,8]"]}, {"name": "base"}]
ABLATION = {"name": "cluster", "title": "Clusters", "rows": ROWS}


def write(folder: Path, **changes: object) -> str:
    tree = {"title": "Test", "base": "demo", "ablations": [ABLATION], **changes}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_rows_are_the_base_with_the_grids_the_rows_and_the_commands_overrides(
    tmp_path: Path,
) -> None:
    name = write(tmp_path, overrides=["train.max_steps=7", "train.log_every=3"])
    plan = resolve(read_grid(name), ["train.log_every=5"])
    small, base = plan.variants
    words = ["train.max_steps=7", "train.log_every=5"]
    assert small.settings == load_recipe("demo", [*words, "objective.cluster=[1,8,8]"])
    assert base.settings == plan.base == load_recipe("demo", words)


def test_equal_rows_are_run_once_however_they_are_written(tmp_path: Path) -> None:
    again = [{"name": "random"}, {"name": "same", "overrides": ["objective.cluster=[2,4,4]"]}]
    other = {"name": "order", "title": "Order", "rows": again}
    plan = resolve(read_grid(write(tmp_path, ablations=[ABLATION, other])))
    assert [variant.name for variant in plan.variants] == ["cluster_small", "cluster_base"]
    assert plan.variant_of["order", "random"] == plan.variant_of["order", "same"] == "cluster_base"


def test_a_row_keeps_what_it_sets_itself(tmp_path: Path) -> None:
    """Else an override of the command would make all rows of an ablation the same."""
    plan = resolve(read_grid(write(tmp_path)), ["objective.cluster=[2,8,8]"])
    small, base = (plan.variants[n].settings for n in range(2))
    assert small == load_recipe("demo", ["objective.cluster=[1,8,8]"])
    assert base == load_recipe("demo", ["objective.cluster=[2,8,8]"])


def test_another_base_replaces_the_grids(tmp_path: Path) -> None:
    plan = resolve(read_grid(write(tmp_path), "pretrain_weizmann"))
    assert plan.base == load_recipe("pretrain_weizmann")


def test_finetuning_from_pretrained_weights_and_from_scratch_are_two_variants() -> None:
    grid = read_grid("finetuning", "finetune_weizmann")
    plan = resolve(grid, ["finetune.init_from=runs/mine"])
    words = [], ["finetune.init_from=runs/mine"]
    scratch, pretrained = (load_recipe("finetune_weizmann", w, FinetuneRecipe) for w in words)
    assert [variant.settings for variant in plan.variants] == [pretrained, scratch]
    cells = cells_of(plan, seeds=2, output=Path(), deepspeed_config=Path(), overrides=())
    with pytest.raises(UserError, match=r"nothing to compare.*finetune\.init_from=RUN"):
        resolve(grid)
    names = ["start_pretrained", "start_scratch"]
    assert [cell.name for cell in cells] == [f"{n}-seed{seed}" for seed in (0, 1) for n in names]


def test_folds_replace_the_shards_and_numbers_are_filled_in() -> None:
    first = ("data.shards=a0", "evaluation.shards=b0")
    given = (*first, "finetune.init_from=runs/{fold}_{seed}")
    plan = resolve(read_grid("finetuning", "finetune_weizmann"), given)
    cells = cells_of(
        plan,
        seeds=2,
        output=Path(),
        deepspeed_config=Path(),
        overrides=given,
        folds=[first, ("data.shards=a1", "evaluation.shards=b1")],
    )
    pretrained = [cell for cell in cells if cell.variant == "start_pretrained"]
    assert [cell.name for cell in pretrained] == [
        f"start_pretrained-fold{fold}-seed{seed}" for seed in (0, 1) for fold in (0, 1)
    ]
    for cell in pretrained:
        recipe = cell.settings()
        assert isinstance(recipe, FinetuneRecipe)
        shards = recipe.data.shards, recipe.evaluation.shards
        assert shards == (f"a{cell.fold}", f"b{cell.fold}")
        assert recipe.finetune.init_from == f"runs/{cell.fold}_{cell.seed}"
        assert recipe.train.seed == cell.seed


def test_a_row_may_name_another_recipe(tmp_path: Path) -> None:
    rows = [{"name": "other", "recipe": "pretrain_weizmann"}, {"name": "base"}]
    plan = resolve(read_grid(write(tmp_path, ablations=[{**ABLATION, "rows": rows}])))
    assert plan.variants[0].settings == load_recipe("pretrain_weizmann")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ablation": []}, ["unknown key 'ablation'", "did you mean 'ablations'"]),
        (
            {"ablations": [{**ABLATION, "rows": [{"name": "a", "override": []}]}]},
            [
                "unknown key 'ablations.0.rows.0.override'",
                "did you mean 'ablations.rows.overrides'",
            ],
        ),
        ({"ablations": [ABLATION, ABLATION]}, ["ablation cluster is there twice"]),
        (
            {"ablations": [{**ABLATION, "rows": [ROWS[1], ROWS[1]]}]},
            ["ablation cluster", "row base is there twice"],
        ),
        ({"ablations": []}, ["ablations=[]", "at least 1"]),
        ({"ablations": [{**ABLATION, "name": "../up"}]}, ["ablations.0.name='../up'"]),
        ({"base": "demoo"}, ["the base", "there is no recipe 'demoo'", "'demo'"]),
        (
            {"ablations": [{**ABLATION, "rows": [{"name": "a", "overrides": ["train.step=3"]}]}]},
            ["row cluster/a", "unknown key 'train.step'"],
        ),
        (
            {
                "ablations": [
                    {
                        **ABLATION,
                        "rows": [{"name": "a", "overrides": ["objective.cluster=[3,3,3]"]}],
                    }
                ]
            },
            ["row cluster/a", "does not divide"],
        ),
        ({"overrides": ["train.max_steps"]}, ["the base", "section.key=value"]),
        (
            {"ablations": [{**ABLATION, "rows": [{"name": "a", "recipe": "finetune_demo"}]}]},
            ["row cluster/a has the task finetune and the base pretrain"],
        ),
    ],
)
def test_a_wrong_grid_is_refused_with_its_place(
    changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(read_grid(write(tmp_path, **changes)))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_grid_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match="events, finetuning, motion, paper, phases, "):
        read_grid("motoin")


def test_cells_come_seed_by_seed_the_untrained_encoder_first(tmp_path: Path) -> None:
    plan = resolve(read_grid(write(tmp_path)))
    cells = cells_of(plan, seeds=2, output=tmp_path, deepspeed_config=tmp_path, overrides=())
    names = [UNTRAINED, "cluster_small", "cluster_base"]
    assert [cell.name for cell in cells] == [f"{n}-seed{seed}" for seed in (0, 1) for n in names]
    assert [cell.trained for cell in cells] == [False, True, True] * 2
    assert [cell.settings().train.seed for cell in cells] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", grid_names())
def test_every_grid_can_be_run(name: str) -> None:
    weights = ["finetune.init_from=RUN"] if name == "finetuning" else []
    assert resolve(read_grid(name), weights).variants


def test_no_grid_is_taken_for_a_recipe() -> None:
    assert not set(grid_names()) & set(recipe_names())
    with pytest.raises(UserError, match="there is no recipe 'motion'"):
        load_recipe("motion")


def test_the_papers_grid_has_every_ablation_with_its_figure() -> None:
    plan = resolve(read_grid("paper"))
    used = {row.recipe or plan.grid.base for a in plan.grid.ablations for row in a.rows}
    assert used == {name for name in recipe_names() if name.startswith("ablation_")}
    for ablation in plan.grid.ablations:
        for row in ablation.rows:
            assert row.paper is not None
            # The recipe's own words about its figure.
            if row.recipe:
                text = (Path("arvideo_ds/recipes/ablations") / f"{row.recipe}.yaml").read_text()
                assert f"{row.paper}" in text.splitlines()[0], row
    assert {len(a.rows) for a in plan.grid.ablations} == {7, 3, 4, 2}


@pytest.mark.parametrize("name", ["motion", "weizmann"])
def test_small_grids_stand_row_by_row_for_the_papers(name: str) -> None:
    figures = {
        ablation.name: [row.paper for row in ablation.rows]
        for ablation in read_grid("paper").ablations
    }
    small = {
        ablation.name: [row.paper for row in ablation.rows]
        for ablation in read_grid(name).ablations
    }
    assert small.pop("objective") == [None] * 3
    assert small.pop("targets", [None] * 3) == [None] * 3
    assert all(small[key] == figures[key] for key in small)
    # No row of an ablation is another one in disguise: 2 and 1 of 32 kept, say.
    plan = resolve(read_grid(name))
    for ablation in plan.grid.ablations:
        variants = [plan.variant_of[ablation.name, row.name] for row in ablation.rows]
        assert len(set(variants)) == len(variants)


def test_the_grid_of_adapters_trains_the_weights_that_its_rows_name() -> None:
    plan = resolve(read_grid("adapters"), ["finetune.init_from=RUN"])
    trained = [cost_of(variant.settings).parameters_trained for variant in plan.variants]
    assert trained == [None, 223752, 264712, 199176, 1288, None]
