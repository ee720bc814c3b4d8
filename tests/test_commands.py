"""What all commands share: how options are spelled, and how a command ends."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.arguments import CommandParser
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, EXIT_USER_ERROR, command
from arvideo_ds.train.command_line import training_parser

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
COMMANDS = sorted(p for p in (ROOT / "arvideo_ds" / "cli").glob("*.py") if p.name != "__init__.py")


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(description="test")
    parser.add_argument("--max_reject_share", type=float)
    parser.add_argument("--init-from")
    parser.add_argument("--sbatch")
    parser.add_argument("--dry_run", action="store_true")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--split_share", type=float)
    parser.add_argument("words", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        (["--max-reject-share", "0.5"], "max_reject_share", 0.5),
        (["--max-reject_share=0.5"], "max_reject_share", 0.5),
        (["--init_from", "RUN"], "init_from", "RUN"),
        (["--init_from=a-b_c"], "init_from", "a-b_c"),
        (["--split-share", "0.5"], "split_share", 0.5),
        (["--dry-run"], "dry_run", True),
        # An abbreviation, as argparse takes it.
        (["--max-rej", "0.5"], "max_reject_share", 0.5),
        # Values stay as they are, whatever they look like.
        (["--sbatch=--dry-run"], "sbatch", "--dry-run"),
        (["--sbatch", "--nodes 1 --gpus-per-node 8"], "sbatch", "--nodes 1 --gpus-per-node 8"),
        (["model.patch=--init-from"], "words", ["model.patch=--init-from"]),
    ],
)
def test_dashes_and_underscores_are_the_same_in_options_and_untouched_in_values(
    typed: list[str], name: str, value: object, parser: CommandParser
) -> None:
    assert getattr(parser.parse_args(typed), name) == value
    assert getattr(parser.parse_intermixed_args(typed), name) == value


def test_a_url_where_a_local_path_is_expected_is_refused(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Path` would make a folder `s3:` of it, in which `--output` would silently be written."""
    parser.add_argument("--output", type=Path)
    parser.add_mutually_exclusive_group().add_argument("--keys", type=Path)
    for name in ("--output", "--keys"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([name, "s3://bucket/shards"])
        assert ended.value.code == EXIT_USER_ERROR
        assert "s3://bucket/shards is a URL" in capsys.readouterr().err


def test_what_follows_two_dashes_is_no_option(parser: CommandParser) -> None:
    assert parser.parse_args(["--", "--max-reject-share"]).words == ["--max-reject-share"]


def test_an_unknown_option_is_reported_as_it_was_typed(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such_option"])
    assert "--no-such_option" in capsys.readouterr().err


def test_help_shows_one_spelling_of_each_option(parser: CommandParser) -> None:
    text = parser.format_help()
    assert "--init-from" in text and "--init_from" not in text
    assert "--max_reject_share" in text and "--max-reject-share" not in text


def test_training_takes_the_flags_of_deepspeed(tmp_path: Path) -> None:
    parser = training_parser("test", "pretrain", tmp_path / "default.json")
    args = parser.parse_intermixed_args(
        ["--deepspeed", "--deepspeed_config", "my.json", "--local_rank=0", "train.seed=1"]
    )
    assert args.deepspeed_config == Path("my.json")
    assert args.overrides == ["train.seed=1"]
    assert parser.parse_intermixed_args(["--deepspeed"]).deepspeed_config.name == "default.json"


def source_of_main(path: Path) -> Path:
    """The file with the command's `main`, which a script may import from the package."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and [name.name for name in node.names] == ["main"]:
            return (ROOT / str(node.module).replace(".", "/")).with_suffix(".py")
    return path


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_has_the_shared_parser_and_the_shared_end(path: Path) -> None:
    """A script with argparse's own parser takes one spelling; one without `command` a traceback."""
    tree = ast.parse(source_of_main(path).read_text(encoding="utf-8"))
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "ArgumentParser" not in called
    (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["command"]


def test_an_interrupted_command_ends_with_one_code_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command
    def main() -> None:
        raise KeyboardInterrupt

    assert main() == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted; start the same command again.\n"


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["within the buffer", "beyond it"])
def test_a_closed_pipe_ends_a_command_quietly(size: int) -> None:
    code = (
        "import sys; from arvideo_ds.errors import command\n"
        "@command\n"
        "def main():\n"
        "    sys.stdin.read()\n"
        f"    print('x' * {size})\n"
        "sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()  # the reader has left, as `head` does
    process.stdin.close()
    assert process.wait(timeout=60) == EXIT_PIPE_CLOSED
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_broken_pipe_that_is_not_the_output_stays_an_error() -> None:
    @command
    def main() -> None:
        raise BrokenPipeError("a data worker is gone")

    with pytest.raises(BrokenPipeError, match="data worker"):
        main()
