"""Shared parts of the command lines: the parser, options, checks of their values."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arvideo_ds.errors import UserError
from arvideo_ds.registry import PLUGINS, listed_plugins

T = TypeVar("T")
# Of every command; its description lists others.
_EXIT_CODES = "Exit codes: 0 done; 2 wrong input; 75 interrupted, start the same command again."


class CommandParser(argparse.ArgumentParser):
    """Accepts `-` for `_` and `_` for `-` in long options, but not in values or after `--`. Every
    command takes `--plugin FILE`, the same as a FILE in ARVIDEO_PLUGINS."""

    def __init__(self, *, epilog: str = "", **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog=f"{_EXIT_CODES}\n\n{epilog}".rstrip(), **options)
        self.register("type", Path, local_path)
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

    # `parse_intermixed_args` calls the first up to Python 3.11, the second from 3.12 on.
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
        """The argument with its option, which may be abbreviated, spelled as it was added."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        options = (option for action in self._actions for option in action.option_strings)
        starts = {option[: len(name)] for option in options if option.startswith("--")}
        alike = {start for start in starts if start.replace("-", "_") == name.replace("-", "_")}
        return argument if name in alike or len(alike) != 1 else alike.pop() + equals + value


def local_path(text: str) -> Path:
    """A path of this machine. Errors: argparse's for a URL, which `Path` would take for one."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, expected a path of this machine (docs/datasets.md, 'Behind a URL', "
            "names what takes URLs)"
        )
    return Path(text)


def export_plugins(args: Sequence[str]) -> None:
    """Add `--plugin` to ARVIDEO_PLUGINS, before plugins' choices and options are needed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugin", action="append", default=[])
    plugins = listed_plugins()
    for plugin in early.parse_known_args(args)[0].plugin:
        # Absolute: processes with another working folder load it as well.
        plugins.append(str(Path(plugin).absolute()) if plugin.endswith(".py") else plugin)
    if plugins:
        os.environ[PLUGINS] = os.pathsep.join(dict.fromkeys(plugins))


def deepspeed_configs() -> dict[str, Path]:
    """The project's DeepSpeed JSON files by name, such as "zero2"."""
    package = Path(__file__).parent
    # A wheel has a copy in the package (setup.py), a checkout has the folder beside it.
    folders = (package / "ds_configs", package.parent / "ds_configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_deepspeed_config(name_or_path: str) -> Path:
    """A file, or one of `deepspeed_configs` by name; it may not exist."""
    path = Path(name_or_path)
    return path if path.is_file() else deepspeed_configs().get(name_or_path, path)


def add_deepspeed(parser: argparse.ArgumentParser, default: str | Path | None) -> None:
    """The options of `deepspeed.add_config_arguments`, without its import."""
    parser.add_argument(
        "--deepspeed_config",
        type=find_deepspeed_config,
        default=default,
        metavar="NAME|PATH",
        help=f"one of: {', '.join(deepspeed_configs())}; or a JSON file",
    )
    # Otherwise argparse would take it as an abbreviation.
    parser.add_argument(
        "--deepspeed", action="store_true", help="for other launch scripts; changes nothing here"
    )


def add_rank(parser: argparse.ArgumentParser) -> None:
    """The option that DeepSpeed's launcher adds to the command of every rank."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings of a recipe; with `parse_intermixed_args`, options may follow them."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def add_weights(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Which weights of a run to use; None: `run_folder.choose_weights` decides."""
    parser.add_argument(
        "--weights", choices=names, help="default: best where the run has it, else last"
    )


def add_public(parser: argparse.ArgumentParser, *, labels: bool = True) -> None:
    """Options of a model without a recipe (evaluation/public.py)."""
    group = parser.add_argument_group("public models", "of transformers, or a .pth of VideoMAE")
    if labels:
        text = "class names in the order of the head: one per line, or .csv or .json"
        group.add_argument("--labels", type=Path, metavar="FILE", help=text)
    group.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="section.key=value",
        help="a setting of the test, such as data.sampling=uniform; may be repeated",
    )


def add_run_or_model(parser: argparse.ArgumentParser, what: str) -> None:
    """The model as the only positional argument or as --model; `required_model` gives it."""
    parser.add_argument("run", type=Path, nargs="?", help=what)
    parser.add_argument("--model", type=Path, help="the same as an option")


def required_model(args: argparse.Namespace) -> Path:
    """Errors: `UserError` unless exactly one of RUN and --model is given."""
    given = [path for path in (args.run, args.model) if path is not None]
    if len(given) != 1:
        both = f": {given[0]} and --model {given[1]} are two" if given else ""
        raise UserError(f"give one model{both}: the folder of a run, or --model of a public model.")
    path: Path = given[0]
    return path


def from_arguments(function: Callable[..., T], args: argparse.Namespace, **more: Any) -> T:
    """Call a function, or a class, whose parameters are options of the same name.

    more: the other parameters.
    """
    names = inspect.signature(function).parameters.keys() & vars(args).keys() - more.keys()
    return function(**{name: getattr(args, name) for name in names}, **more)


def require_at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Errors: `UserError` for an option that is set and below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value:g} must be {least} or more.")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Errors: `UserError` for an option that is set and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} must be above 0.")
