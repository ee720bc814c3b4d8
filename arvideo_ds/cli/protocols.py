"""Write docs/protocols.md: each recipe's numbers beside those of papers and official scripts.

    arvideo protocols             # after a change of recipes or of docs/protocols.yaml
    arvideo protocols --check     # writes nothing

A recipe that differs from docs/protocols.yaml without a reason given there is an error, and the
page is not written.
Exit code 1: a recipe deviates, or with --check the page is stale.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser
from arvideo_ds.cli import DOCS, keep_page, log
from arvideo_ds.errors import command
from arvideo_ds.planning.protocols import all_numbers, deviations, page, read_protocols

EXIT_DEVIATES = 1


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if stale")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of protocols.yaml")
    args = parser.parse_args()
    protocols, numbers = read_protocols(args.docs / "protocols.yaml"), all_numbers()
    wrong = deviations(protocols, numbers)
    if wrong:
        log("\n".join(wrong))
        return EXIT_DEVIATES
    path, text = args.docs / "protocols.md", page(protocols, numbers)
    return keep_page(path, text, check=args.check, by="arvideo protocols")
