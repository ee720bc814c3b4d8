"""Rows of a comparison, from the command line: recipe, variant and settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan, make_plan

# PAPER: attention in single operations, and every token of the clip is embedded before the encoded
# tokens are picked.
PLAIN, PAPER = "plain", "paper"
VARIANTS = (PLAIN, PAPER)
# A comma before another override, not inside a value.
_NEXT_OVERRIDE = re.compile(r",(?=[A-Za-z_]\w*(?:\.\w+)+=)")

Log = Callable[[str], None]


@dataclass(frozen=True)
class BenchmarkOptions:
    """How rows are measured: `rounds` turns of `steps` steps each.

    trace: folder of Chrome traces. shards: also feed the first row from them.
    """

    rounds: int
    steps: int
    warm_up: int
    largest_batch: bool = False
    profile: bool = False
    trace: Path | None = None
    shards: str | None = None


@dataclass(frozen=True)
class Row:
    """A row, planned for one process; a step is one micro-batch. name: the argument."""

    name: str
    variant: str
    recipe: PretrainRecipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    with_batch: Callable[[int], Row]


def read_row(text: str, overrides: Sequence[str], micro_batch: int, deepspeed_config: Path) -> Row:
    """Plan `RECIPE[:VARIANT][,section.key=value...]`, where RECIPE is a name or a path.

    The row's own overrides come after those of all rows.
    Errors: `UserError` for an unknown recipe, variant or setting, and for an invalid batch.
    """
    head, *more = _NEXT_OVERRIDE.split(text)
    recipe_name, _, variant = head.partition(":")
    variant = variant or PLAIN
    if variant not in VARIANTS:
        raise UserError(
            f"row '{text}': there is no variant '{variant}'; there are: {', '.join(VARIANTS)}."
        )
    if micro_batch < 1:
        raise UserError(f"--micro_batch {micro_batch} must be 1 or more.")
    batch = [f"train.total_batch={micro_batch}", f"train.micro_batch={micro_batch}"]
    recipe = load_recipe(recipe_name, [*overrides, *more, *batch])
    recipe = recipe.by_phase()[-1]
    plan = make_plan(recipe, world_size=1, num_videos=micro_batch)
    tree = read_deepspeed_json(deepspeed_config)
    config = resolve(tree, recipe, plan, str(deepspeed_config))
    with_batch = partial(read_row, text, overrides, deepspeed_config=deepspeed_config)
    return Row(text, variant, recipe, plan, config, with_batch)
