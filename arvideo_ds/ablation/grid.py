"""Grid YAML -> rows and their variants; errors name the row. Needs no torch.

A grid has ablations, an ablation has rows; a row is the grid's base recipe (or its own `recipe`)
with the overrides of the grid, of the command and of the row. Rows with the same recipe share one
variant, which runs once per seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.config.load import GRIDS, parse, read_yaml, recipes_dir
from arvideo_ds.config.settings import Positive, Settings
from arvideo_ds.errors import UserError

# Part of a folder's name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
# Reference: the base recipe's encoder before any training.
UNTRAINED = "untrained"


class GridRow(Settings):
    """recipe: replaces the grid's base. paper: the paper's figure of this row. note: a remark."""

    name: Name
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    paper: float | None = None
    note: str = ""


class Ablation(Settings):
    name: Name
    title: str
    rows: Annotated[tuple[GridRow, ...], Field(min_length=1)]


class Grid(Settings):
    """paper_figure: describes the rows' `paper`. probe_videos: to fit and test on; default all."""

    title: str
    base: str
    overrides: tuple[str, ...] = ()
    paper_figure: str = "top-1, %"
    probe_videos: tuple[Positive, Positive] | None = None
    ablations: Annotated[tuple[Ablation, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """A recipe to run with several seeds; `name` is that of its first row."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    settings: Recipe


@dataclass(frozen=True)
class GridPlan:
    """A resolved grid: its variants, and the variant of every (ablation, row)."""

    grid: Grid
    base: Recipe
    variants: tuple[Variant, ...]
    variant_of: dict[tuple[str, str], str]


def grid_names() -> list[str]:
    return sorted(path.stem for path in (recipes_dir() / GRIDS).glob("*.yaml"))


def read_grid(name_or_path: str, base: str | None = None) -> Grid:
    """A grid by name (`grid_names`) or path. base: replaces its base. Errors: `UserError`."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = recipes_dir() / GRIDS / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UserError(
            f"there is no grid '{name_or_path}'; give the path of a YAML file or one of: "
            f"{', '.join(grid_names())}."
        )
    grid = parse(Grid, read_yaml(path), f"grid {path.name}")
    where = f"grid {path.name}"
    _require_unique((a.name for a in grid.ablations), where, "ablation")
    for ablation in grid.ablations:
        rows = (row.name for row in ablation.rows)
        _require_unique(rows, f"{where}, ablation {ablation.name}", "row")
    return grid if base is None else grid.model_copy(update={"base": base})


def resolve(grid: Grid, overrides: Sequence[str] = ()) -> GridPlan:
    """Load the recipe of every row; a row's overrides come after `overrides`.

    Errors: `UserError` that names the row.
    """
    variants: list[Variant] = []
    variant_of: dict[tuple[str, str], str] = {}
    shared = (*grid.overrides, *overrides)
    base = _load("the base", grid.base, shared)
    for ablation in grid.ablations:
        for row in ablation.rows:
            where, recipe = f"row {ablation.name}/{row.name}", row.recipe or grid.base
            settings = _load(where, recipe, (*shared, *row.overrides))
            if settings.task != base.task:
                raise UserError(
                    f"{where} has the task {settings.task} and the base {base.task}; the rows of "
                    "a grid share their measures."
                )
            names = [variant.name for variant in variants if variant.settings == settings]
            if not names:
                names = [f"{ablation.name}_{row.name}"]
                variants.append(Variant(names[0], recipe, (*shared, *row.overrides), settings))
            variant_of[ablation.name, row.name] = names[0]
    if len(variants) == 1 < len(variant_of):
        raise UserError(
            "all rows of the grid are the same recipe, so there is nothing to compare. Is an "
            "override missing, such as finetune.init_from=RUN?"
        )
    return GridPlan(grid, base, tuple(variants), variant_of)


def _load(what: str, recipe: str, overrides: Sequence[str]) -> Recipe:
    try:
        return load_recipe(recipe, overrides, Recipe)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _require_unique(names: Iterable[str], where: str, what: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: {what} {twice[0]} is there twice; rename or remove one.")
