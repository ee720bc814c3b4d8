"""Write the README's table of the cost of pretraining: hours, memory and cores, predicted.

    arvideo costs             # after a change of recipes or of what `arvideo plan` predicts
    arvideo costs --check     # writes nothing

Only for a checkout. Exit code 1: with --check the table is stale.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, find_deepspeed_config
from arvideo_ds.cli import DOCS, keep_page
from arvideo_ds.engine.resolve import read_deepspeed_json
from arvideo_ds.errors import command
from arvideo_ds.planning.costs import cost_table, replaced
from arvideo_ds.planning.memory import Strategy

README = DOCS.parent / "README.md"


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if stale")
    parser.add_argument("--readme", type=Path, default=README, help="page with the table's marks")
    args = parser.parse_args()
    zero2 = read_deepspeed_json(find_deepspeed_config("zero2"))
    old = args.readme.read_text(encoding="utf-8")
    new = replaced(old, cost_table(Strategy.from_json(zero2)))
    return keep_page(args.readme, new, check=args.check, by="arvideo costs")
