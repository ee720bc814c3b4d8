"""The command line of all scripts: one parser, one spelling rule, DeepSpeed's own options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Takes `-` and `_` alike in the names of long options; help shows them as they were added.

    Values stay untouched: those after `=`, those in an argument of their own, and all after `--`.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    # `parse_intermixed_args` calls the first of the two up to Python 3.11, the second from 3.12 on.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._spelled(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_intermixed_args(self._spelled(args), namespace)

    def _spelled(self, args: Sequence[str] | None) -> list[str]:
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        return [*map(self._as_added, args[:end]), *args[end:]]

    def _as_added(self, argument: str) -> str:
        """The argument with its option's name, or an abbreviation of it, as it was added."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        known = {option[: len(name)] for option in self._option_strings()}
        alike = {option for option in known if _unified(option) == _unified(name)}
        return argument if name in alike or len(alike) != 1 else alike.pop() + equals + value

    def _option_strings(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings


def _unified(option: str) -> str:
    return option[:2] + option[2:].replace("-", "_")


def add_deepspeed(parser: argparse.ArgumentParser, default: Path) -> None:
    """The options that `deepspeed.add_config_arguments` gives to scripts, without its import."""
    parser.add_argument("--deepspeed_config", type=Path, default=default, help="JSON file")
    # Else argparse would take it as an abbreviation of the other.
    parser.add_argument(
        "--deepspeed", action="store_true", help="for other launch scripts; changes nothing here"
    )
