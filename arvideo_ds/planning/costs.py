"""The README's table of what pretraining on Kinetics-400 costs, predicted as by `arvideo plan`."""

from __future__ import annotations

import math

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.planning.advice import (
    ASSUMED_BANDWIDTH_GB_S,
    GIB,
    Machine,
    compare,
    recommend,
    run_seconds,
)
from arvideo_ds.planning.data import supply
from arvideo_ds.planning.gpus import GPUS, UTILIZATION
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.plan import make_plan

SIZES = "SBLHg"
MACHINES = ((1, "4090"), (1, "h100"), (8, "a100"), (8, "h100"), (64, "h100"))
START, END = "<!-- costs: written by `arvideo costs` -->\n", "<!-- end of costs -->\n"


def cost_table(base: Strategy) -> str:
    """Markdown; a row per size and a column per machine. base: of the DeepSpeed JSON."""
    names = [f"{count} x {gpu.upper()}, {GPUS[gpu].memory_gib:g} GB" for count, gpu in MACHINES]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(MACHINES) + 1) + "|"]
    for size in SIZES:
        recipe = load_recipe(f"pretrain_vit_{size.lower()}_k400", (), PretrainRecipe)
        cells = [_cell(recipe, base, count, gpu) for count, gpu in MACHINES]
        lines.append(f"| ViT-{size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(recipe: PretrainRecipe, base: Strategy, count: int, gpu: str) -> str:
    """Hours, GiB of a GPU, and cores that decode for all GPUs, of the recommended option."""
    tflops = UTILIZATION * GPUS[gpu].peak_tflops
    machine = Machine(count, GPUS[gpu].memory_gib, tflops, ASSUMED_BANDWIDTH_GB_S)
    plan = make_plan(recipe, world_size=count)
    best = recommend(compare(recipe, base, machine))
    seconds = None if best is None else run_seconds(recipe, plan, best, machine)
    if best is None or seconds is None:
        return "does not fit without offloading"
    rate = plan.steps * plan.total_batch / seconds
    needs = supply(
        recipe, rate, num_videos=plan.num_videos, stored_bytes=None, rate_per_core=None, cores=None
    )
    hours, gib = seconds / 3600, best.footprint.peak / GIB
    shown = f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"
    return f"{shown} h, {gib:.0f} GiB, {math.ceil(needs.decode_cores)}"


def replaced(text: str, table: str) -> str:
    """The page with this table between its two marks. Errors: `ValueError` without them."""
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no table between {START!r} and {END!r}")
    return f"{before}{START}{table}{end}{after}"
