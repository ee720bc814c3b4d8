"""Print settings of recipes: type, default and meaning.

    arvideo settings                    # the sections
    arvideo settings data.crop          # a key
    arvideo settings data optim         # sections
    arvideo settings finetune           # a task, without the sections that all tasks share
    arvideo settings --write            # after a change of the schema: docs/settings.md
    arvideo settings --check            # writes nothing

Exit code 1: with --check, the page is stale.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser
from arvideo_ds.cli import DOCS, keep_page
from arvideo_ds.config.objectives import OBJECTIVES
from arvideo_ds.config.reference import Choices, describe, find, listing, page, reference
from arvideo_ds.config.schema import RECIPES
from arvideo_ds.config.sizes import BACKBONES, SIZES
from arvideo_ds.errors import EXIT_OK, command
from arvideo_ds.evaluation.probes import POOLINGS
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.optim.schedule import SCHEDULES

# Settings whose names are in tables that plugins extend.
CHOICES: Choices = {
    "task": RECIPES,
    "model.name": BACKBONES,
    "model.size": SIZES,
    "objective.name": OBJECTIVES,
    "objective.teacher_size": SIZES,
    "finetune.teacher_size": SIZES,
    "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "probe.features": POOLINGS,
}


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="KEY|SECTION|TASK")
    parser.add_argument("--write", action="store_true", help="write docs/settings.md")
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if stale")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of settings.md")
    args = parser.parse_args()
    sections = reference(CHOICES)
    if args.write or args.check:
        path, by = args.docs / "settings.md", "arvideo settings --write"
        return keep_page(path, page(sections), check=args.check, by=by)
    if args.names:
        print("\n\n".join(describe(find(name, sections)) for name in args.names))
    else:
        print(listing(sections))
    return EXIT_OK
