"""Rows of a comparison, from the command line: which recipe, in which way, with which settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan, make_plan

# As the recipe says; or as the paper ran it: attention in single operations, and every token of
# the clip embedded before the encoded ones are picked.
PLAIN, PAPER = "plain", "paper"
VARIANTS = (PLAIN, PAPER)
# A comma that begins another override, not one inside of a value.
_NEXT_OVERRIDE = re.compile(r",(?=[A-Za-z_]\w*(?:\.\w+)+=)")


Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How rows are measured: `rounds` turns of `steps` each, and what is asked besides."""

    rounds: int
    steps: int
    warm_up: int
    largest_batch: bool = False
    profile: bool = False
    # Folder of Chrome traces.
    trace: Path | None = None
    # Folder of shards that the first row is fed from as well.
    shards: str | None = None


@dataclass(frozen=True)
class Row:
    """One row, settled for one process: `name` as it was given; a step is one micro-batch."""

    name: str
    variant: str
    recipe: PretrainRecipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    with_batch: Callable[[int], Row]


def read_row(
    text: str, overrides: Sequence[str], *, micro_batch: int, deepspeed_config: Path
) -> Row:
    """Settle `RECIPE[:VARIANT][,section.key=value...]`, where RECIPE is a name or a path.

    The row's own overrides come after those of all rows.
    Errors: `UserError` for an unknown recipe, variant or setting, and for a batch that is none.
    """
    named, *own = _NEXT_OVERRIDE.split(text)
    recipe_name, _, variant = named.partition(":")
    variant = variant or PLAIN
    if variant not in VARIANTS:
        raise UserError(
            f"row '{text}': there is no variant '{variant}'; there are: {', '.join(VARIANTS)}."
        )
    if micro_batch < 1:
        raise UserError(f"--micro_batch {micro_batch} must be 1 or more.")
    batch = [f"train.total_batch={micro_batch}", f"train.micro_batch={micro_batch}"]
    recipe = load_recipe(recipe_name, [*overrides, *own, *batch])
    plan = make_plan(recipe, world_size=1, num_videos=micro_batch)
    tree = read_deepspeed_json(deepspeed_config)
    config = resolve(tree, recipe, plan, str(deepspeed_config))

    def with_batch(size: int) -> Row:
        return read_row(text, overrides, micro_batch=size, deepspeed_config=deepspeed_config)

    return Row(text, variant, recipe, plan, config, with_batch)
