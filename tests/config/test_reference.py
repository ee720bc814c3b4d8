"""The reference of settings: complete, current, and instant in a terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.cli.settings import CHOICES
from arvideo_ds.config import Recipe, load_recipe, recipe_names
from arvideo_ds.config.reference import Section, describe, find, page, reference
from arvideo_ds.errors import EXIT_USER_ERROR, UserError

Run = Callable[..., subprocess.CompletedProcess[str]]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    return reference(CHOICES)


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a recipe's values, with N for places in lists."""
    for key, value in tree.items():
        items = value if isinstance(value, tuple | list) else [value]
        place = ".N." if items is value else "."
        below = [item for item in items if isinstance(item, Mapping)]
        if not isinstance(value, Mapping):
            yield prefix + key
        for item in below:
            # The section of a phase has any keys of the objective.
            if not (prefix.startswith("phases.") and key == "objective"):
                yield from keys_of(item, prefix + key + place)


def test_every_key_of_every_recipe_has_a_meaning(sections: list[Section]) -> None:
    meanings = {s.key: s.meaning for section in sections for s in section.settings}
    assert [key for key, meaning in meanings.items() if not meaning] == []
    for name in recipe_names():
        tree = load_recipe(name, (), Recipe).model_dump()
        missing = set(keys_of(tree)) - meanings.keys()
        assert missing == set(), name


def test_the_page_is_current(sections: list[Section]) -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert text == page(sections), "run: arvideo settings --write"


def test_a_key_shows_type_default_and_meaning(sections: list[Section]) -> None:
    text = " ".join(describe(find("data.crop", sections)).split())
    for part in ("one of multi_scale, random_resized", "default multi_scale", "crop_scales"):
        assert part in text


@pytest.mark.parametrize(
    ("query", "included", "excluded"),
    [
        ("data", "data.sources.N.weight", "optim.base_lr"),
        ("data.sources.3", "data.sources.N.weight", "data.crop"),
        # A section, not the keys that begin with its name.
        ("train", "train.epochs", "finetune.train"),
        ("data.crop", "data.crop", "data.crop_scales"),
        ("finetune", "evaluation.views", "data.crop"),
        ("tokenizer", "tokenizer.levels", "objective.name"),
    ],
)
def test_a_query_finds_a_key_a_section_or_a_task(
    query: str, included: str, excluded: str, sections: list[Section]
) -> None:
    keys = {s.key for section in find(query, sections) for s in section.settings}
    assert included in keys
    assert excluded not in keys


@pytest.mark.parametrize(
    ("query", "near"), [("data.corp", "data.crop"), ("crop_scale", "data.crop_scales")]
)
def test_an_unknown_key_is_an_error_that_names_a_near_one(
    query: str, near: str, sections: list[Section]
) -> None:
    with pytest.raises(UserError, match=f"'{query}'.* Did you mean '{near}'"):
        find(query, sections)


def test_a_key_that_differs_between_tasks_is_shown_for_each(sections: list[Section]) -> None:
    found = find("evaluation.views", sections)
    assert {section.tasks: section.settings[0].default for section in found} == {
        ("finetune",): "[2, 3]",
        ("detect",): "3",
    }


def test_the_command_answers_at_once_without_torch(run: Run) -> None:
    code = "import sys, time; from arvideo_ds.cli.settings import main; "
    code += "sys.argv = ['settings', 'data.crop']; main(); "
    code += "assert 'torch' not in sys.modules and time.process_time() < 2"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "default    multi_scale" in done.stdout


def test_the_command_refuses_an_unknown_key(run: Run) -> None:
    done = run(sys.executable, "-m", "arvideo_ds", "settings", "data.corp")
    assert done.returncode == EXIT_USER_ERROR
    assert "Did you mean 'data.crop'?" in done.stderr


def test_the_command_checks_without_writing(run: Run, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "arvideo_ds", "settings", "--docs", tmp_path)
    (tmp_path / "settings.md").write_text("old\n")
    done = run(*command, "--check")
    assert done.returncode == 1
    assert "is stale; run: arvideo settings --write" in done.stderr
    assert (tmp_path / "settings.md").read_text() == "old\n"


def test_settings_of_a_plugin_are_explained(run: Run, tmp_path: Path) -> None:
    plugin = tmp_path / "still.py"
    plugin.write_text(
        "from typing import Literal\n"
        "from arvideo_ds.config.objectives import OBJECTIVES, VideomaeSettings\n"
        "@OBJECTIVES.register('still')\n"
        "class Still(VideomaeSettings):\n"
        "    name: Literal['still'] = 'still'\n"
        "    pause: int = 3\n"
        "    'Frames that repeat.'\n"
    )
    command = (sys.executable, "-m", "arvideo_ds", "settings", "--plugin", plugin)
    done = run(*command, "objective.pause", "objective.name")
    assert done.returncode == 0, done.stderr
    for part in ("objectives still", "default    3", "Frames that repeat.", "lvmae, still"):
        assert part in done.stdout
