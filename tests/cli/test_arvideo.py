"""The command `arvideo`: it starts at once, knows its commands, and runs them as the scripts do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.arguments import CommandParser, deepspeed_configs, find_deepspeed_config
from arvideo_ds.cli import COMMANDS, main
from arvideo_ds.engine.resolve import read_deepspeed_json
from arvideo_ds.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from arvideo_ds.registry import PLUGINS, Registry

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p for room in ("scripts", "data_tools") for p in (ROOT / room).glob("*.py"))
HELP_OF_ALL = """
import sys
from arvideo_ds.cli import COMMANDS, find
for name in COMMANDS:
    sys.argv = [f"arvideo {name}", "--help"]
    try:
        find(name)()
    except SystemExit as ended:
        assert not ended.code
print("loaded:", *({"torch", "deepspeed", "matplotlib"} & set(sys.modules)))
"""


def arvideo(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["arvideo", *words])
    return main()


def test_help_lists_the_commands_and_imports_none_of_them(run: Run) -> None:
    code = "from arvideo_ds.cli import main; main(); import sys; print(*sys.modules)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    *text, loaded = done.stdout.splitlines()
    for name in COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in text) == 1
    modules = set(loaded.split())
    assert "arvideo_ds.cli" in modules
    # What would take a noticeable time.
    assert not modules & {"torch", "deepspeed", "numpy", "pydantic", "yaml", "arvideo_ds.config"}


def test_every_module_of_the_room_is_a_command() -> None:
    modules = {p.stem for p in (ROOT / "arvideo_ds" / "cli").glob("*.py")} - {"__init__"}
    assert modules == set(COMMANDS)


def test_an_unknown_command_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arvideo(monkeypatch, "pretrian", "--dry_run") == EXIT_USER_ERROR
    assert "Did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["evaluate_detection", "evaluate-detection"])
def test_a_command_takes_its_arguments_after_its_name(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arvideo(monkeypatch, word, "nowhere") == EXIT_USER_ERROR
    assert "nowhere has no recipe.yaml" in capsys.readouterr().err


def test_the_option_of_deepspeeds_launcher_may_come_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arvideo(monkeypatch, "--local_rank=0", "pretrain", "--dry_run") == EXIT_OK
    assert '"plan"' in capsys.readouterr().out


def test_a_module_of_python_is_the_same_command(run: Run) -> None:
    done = run(sys.executable, "-m", "arvideo_ds", "plan", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: arvideo plan ")


def test_the_help_of_every_command_imports_no_torch(run: Run) -> None:
    done = run(sys.executable, "-c", HELP_OF_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.stdout.count("--plugin FILE") >= len(COMMANDS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_only_starts_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    (own,) = (node.module for node in imports if isinstance(node, ast.ImportFrom))
    room, _, name = str(own).rpartition(".")
    assert room == "arvideo_ds.cli" and name in COMMANDS
    assert len(imports) == 1


def test_plugins_are_known_before_choices_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to processes that start elsewhere: the variable has the whole path, once."""
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.chdir(tmp_path)
    readers = Registry("reader", {"folder": 1})
    monkeypatch.setattr("arvideo_ds.cli.test_readers", readers, raising=False)
    (tmp_path / "mine.py").write_text(
        "from arvideo_ds.cli import test_readers\ntest_readers.register('mine')(2)\n"
    )
    parser = CommandParser()
    parser.add_argument("--dataset", choices=readers)
    for words in (["--dataset", "mine", "--plugin", "mine.py"], ["--plugin=mine.py"]):
        parser.parse_args(words)
    assert os.environ[PLUGINS] == str(tmp_path / "mine.py")
    assert parser.parse_args(["--dataset=mine"]).dataset == "mine"


@pytest.mark.parametrize("name", deepspeed_configs())
def test_a_deepspeed_configuration_has_a_name_everywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = read_deepspeed_json(ROOT / "ds_configs" / f"{name}.json")
    assert read_deepspeed_json(find_deepspeed_config(name)) == expected
    # A file of that name comes first.
    (tmp_path / name).write_text("{}")
    assert read_deepspeed_json(find_deepspeed_config(name)) == {}


def test_an_unknown_configuration_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match="zero2_checkpointing"):
        read_deepspeed_json(find_deepspeed_config("zero5"))


def test_a_log_file_gets_few_lines_of_a_progress_bar(run: Run) -> None:
    """A terminal redraws the bar; a file of a Slurm job would keep ten lines of each second."""
    code = (
        "import time, arvideo_ds.cli\n"
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(30)):\n"
        "    time.sleep(0.03)"
    )
    done = run(sys.executable, "-c", code)
    assert "30/30" in done.stderr  # the end is shown
    assert done.stderr.count("it/s") + done.stderr.count("s/it") <= 2
