"""What the command lines of all commands share: one parser, options, checks of their values."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arvideo_ds.errors import UserError
from arvideo_ds.registry import PLUGINS

T = TypeVar("T")


class CommandParser(argparse.ArgumentParser):
    """Takes `-` and `_` alike in the names of long options; help shows them as they were added.

    Values stay untouched: those after `=`, those in an argument of their own, and all after `--`.
    Every command takes `--plugin FILE`, which is the same as a FILE in ARVIDEO_PLUGINS.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        self.add_argument(
            "--plugin",
            action="append",
            metavar="FILE",
            help=f"Python file or module that adds choices, as in {PLUGINS}; may be repeated",
        )

    def add_number(self, name: str, default: float, description: str) -> None:
        """Option `--name` of the default's type; help shows the default."""
        text = f"{description}; default %(default)s"
        self.add_argument(f"--{name}", type=type(default), default=default, help=text)

    # `parse_intermixed_args` calls the first of the two up to Python 3.11, the second from 3.12 on.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._spelled(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_intermixed_args(self._spelled(args), namespace)

    def _spelled(self, args: Sequence[str] | None) -> list[str]:
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        spelled = [*map(self._as_added, args[:end]), *args[end:]]
        export_plugins(spelled)
        return spelled

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


def export_plugins(args: Sequence[str]) -> None:
    """Before other arguments are read, or added: choices and options may come from plugins."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugin", action="append", default=[])
    plugins = [item for item in os.environ.get(PLUGINS, "").split(os.pathsep) if item]
    for plugin in early.parse_known_args(args)[0].plugin:
        # Processes with another working folder load it as well.
        plugins.append(str(Path(plugin).absolute()) if plugin.endswith(".py") else plugin)
    if plugins:
        os.environ[PLUGINS] = os.pathsep.join(dict.fromkeys(plugins))


def deepspeed_configs() -> dict[str, Path]:
    """The DeepSpeed JSON files of this project by name, such as "zero2"."""
    package = Path(__file__).parent
    # A wheel has a copy inside the package (setup.py); a checkout has the folder beside it.
    folders = (package / "ds_configs", package.parent / "ds_configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_deepspeed_config(name_or_path: str) -> Path:
    """A file, or one of ours by name. Whether it exists is checked where it is read."""
    path = Path(name_or_path)
    return path if path.is_file() else deepspeed_configs().get(name_or_path, path)


def add_deepspeed(parser: argparse.ArgumentParser, default: str | Path) -> None:
    """The options that `deepspeed.add_config_arguments` gives to scripts, without its import."""
    parser.add_argument(
        "--deepspeed_config",
        type=find_deepspeed_config,
        default=default,
        metavar="NAME|PATH",
        help=f"one of: {', '.join(deepspeed_configs())}; or a JSON file",
    )
    # Else argparse would take it as an abbreviation of the other.
    parser.add_argument(
        "--deepspeed", action="store_true", help="for other launch scripts; changes nothing here"
    )


def add_rank(parser: argparse.ArgumentParser) -> None:
    """The option that DeepSpeed's launcher adds to the command of every rank."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings of a recipe; read them by `parse_intermixed_args`, so that options may follow."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def add_weights(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Which weights of a run are used; `None` chooses (runs/run_folder.py)."""
    parser.add_argument(
        "--weights", choices=names, help="default: best where the run has it, else last"
    )


def from_arguments(function: Callable[..., T], args: argparse.Namespace, **more: Any) -> T:
    """Call a function, or a class, whose parameters are options of the same name.

    more: the other parameters.
    """
    names = inspect.signature(function).parameters.keys() & vars(args).keys() - more.keys()
    return function(**{name: getattr(args, name) for name in names}, **more)


def require_at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Errors: `UserError` for an option that was given and is below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value:g} must be {least} or more.")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Errors: `UserError` for an option that was given and is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} must be above 0.")
