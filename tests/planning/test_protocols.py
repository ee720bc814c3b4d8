"""Published numbers and the recipes: no deviation without a reason, and no stale page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from arvideo_ds.config.load import parse, read_yaml, recipe_names, recipes_dir
from arvideo_ds.planning.protocols import (
    Protocols,
    Values,
    all_numbers,
    deviations,
    numbers_of,
    page,
    read_protocols,
)

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS.parent / "scripts" / "protocols.py"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def numbers() -> dict[str, Values]:
    return all_numbers()


def test_every_recipe_has_the_published_numbers_or_says_why_not(
    numbers: dict[str, Values],
) -> None:
    assert deviations(read_protocols(DOCS / "protocols.yaml"), numbers) == []


def test_the_page_is_what_the_file_and_the_recipes_say(numbers: dict[str, Values]) -> None:
    text = page(read_protocols(DOCS / "protocols.yaml"), numbers)
    assert (DOCS / "protocols.md").read_text(encoding="utf-8") == text, "run scripts/protocols.py"


def test_every_recipe_of_a_published_protocol_is_on_the_page() -> None:
    protocols = read_protocols(DOCS / "protocols.yaml")
    published = {
        path.stem
        for folder in ("k400", "ssv2", "baselines", "ablations", "ava")
        for path in (recipes_dir() / folder).glob("*.yaml")
    } | {"finetune_vit_b_ucf101", "finetune_vit_b_hmdb51"}
    listed = {name for section in protocols.sections for name in section.recipes}
    assert published <= listed
    # None of them without a claim that names it or all of its section.
    for section in protocols.sections:
        for name in section.recipes:
            assert any(name in (c.recipes or section.recipes) for c in section.claims), name


def small(**claim: Any) -> Protocols:
    """One section of one recipe, all others our own."""
    name = "finetune_vit_b_k400"
    section = {
        "title": "Test",
        "recipes": [name],
        "claims": [{"source": "a script", "published": {"train.epochs": 75}, **claim}],
    }
    own = [other for other in recipe_names() if other != name]
    tree = {"introduction": "", "own": own, "sections": [section]}
    return parse(Protocols, tree, "test")


WHY = {"because": "a reason"}


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (
            {"published": {"optim.base_lr": 1.0e-3}},
            "finetune_vit_b_k400: optim.base_lr is 0.0005, but a script says 0.001.",
        ),
        ({"published": {"optim.base_lr": "5e-4"}}, "optim.base_lr is 0.0005, but a script says"),
        ({"published": {"data.flip": 1}}, "data.flip is true"),
        ({"published": {"videos_per_step": 384}}, "videos_per_step is 256"),
        ({"published": {"train.epoch": 75}}, "has no train.epoch"),
        (
            {"published": {"train.epochs": 90}, "here": {"train.epochs": 80}, **WHY},
            "is 75, but a script says 90 (here 80: a reason)",
        ),
        ({"here": {"train.epochs": 75}, **WHY}, "train.epochs is 75 in both"),
        (
            {"published": {"train.epochs": 90}, "here": {"train.epochs": 75}},
            "needs both `here` and `because`",
        ),
        ({"here": {"optim.clip": 0.0}, **WHY}, "`published` does not"),
        ({"recipes": ["demo"]}, "demo is not a recipe of the section"),
    ],
)
def test_a_deviation_is_reported_with_recipe_key_and_source(
    claim: dict[str, Any], said: str, numbers: dict[str, Values]
) -> None:
    found = deviations(small(**claim), numbers)
    assert any(said in sentence for sentence in found), found


def test_a_deviation_with_a_reason_passes_and_is_on_the_page(numbers: dict[str, Values]) -> None:
    claim = {"published": {"train.epochs": 90}, "here": {"train.epochs": 75}, **WHY}
    assert deviations(small(**claim), numbers) == []
    assert "`train.epochs` **75** for 90: a reason" in page(small(**claim), numbers)


def test_a_recipe_that_is_nowhere_or_twice_is_reported(numbers: dict[str, Values]) -> None:
    protocols = small()
    without = protocols.model_copy(update={"own": protocols.own[1:]})
    (found,) = deviations(without, numbers)
    assert found.startswith(f"recipe {protocols.own[0]} has no section of published numbers")
    twice = protocols.model_copy(update={"own": (*protocols.own, "finetune_vit_b_k400", "none")})
    assert len(deviations(twice, numbers)) == 2


def test_the_decoder_of_the_size_table_counts_as_the_recipes() -> None:
    numbers = numbers_of("videomae_vit_b_k400")
    assert [numbers[f"decoder.{key}"] for key in ("width", "depth", "heads")] == [384, 4, 6]


@pytest.mark.parametrize("stale", [False, True])
def test_the_command_checks_without_writing(run: Run, tmp_path: Path, stale: bool) -> None:
    command = (sys.executable, SCRIPT, "--docs", tmp_path)
    for source in (DOCS / "protocols.yaml", DOCS / "protocols.md"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    copy = tmp_path / "protocols.md"
    if stale:
        copy.write_text("old\n")
    before = copy.read_bytes()
    done = run(*command, "--check")
    assert done.returncode == int(stale), done.stderr
    assert ("is stale; run: arvideo protocols" in done.stderr) == stale
    assert copy.read_bytes() == before
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == (DOCS / "protocols.md").read_bytes()


def test_the_command_names_a_deviation_and_keeps_the_page(run: Run, tmp_path: Path) -> None:
    tree = read_yaml(DOCS / "protocols.yaml")
    tree["sections"][0]["claims"][0]["published"]["data.frames"] = 32
    (tmp_path / "protocols.yaml").write_text(yaml.safe_dump(tree))
    done = run(sys.executable, SCRIPT, "--docs", tmp_path)
    assert done.returncode == 1
    assert "pretrain_vit_s_k400: data.frames is 16, but VideoMAE" in done.stderr
    assert not (tmp_path / "protocols.md").exists()
