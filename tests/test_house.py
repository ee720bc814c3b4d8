"""The house: imports go one way, settings are read without torch, DeepSpeed stays in its room."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import arvideo_ds
from tests.conftest import LONGEST

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
SOURCES = [
    p for room in ("arvideo_ds", "scripts", "data_tools") for p in (ROOT / room).rglob("*.py")
]
LISTING = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
HEAVY = {"torch", "deepspeed", "timm", "einops"}


def modules_after(run: Run, code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after running the code."""
    done = run(sys.executable, "-c", code + LISTING)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_settings_are_read_without_torch_and_deepspeed(run: Run) -> None:
    loaded = modules_after(
        run,
        "import arvideo_ds.train.settle, arvideo_ds.engine.launcher; "
        "from arvideo_ds import config, tasks; import arvideo_ds.planning.plan as p; "
        "p.make_plan(config.load_recipe('demo'), world_size=8); list(tasks.TASKS.values())",
    )
    assert "pydantic" in loaded  # the listing works
    assert not loaded & HEAVY


def test_the_command_line_of_pretraining_is_read_without_torch_and_deepspeed(run: Run) -> None:
    loaded = modules_after(run, "import runpy; runpy.run_path('scripts/pretrain.py')")
    assert "arvideo_ds" in loaded
    assert not loaded & HEAVY


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_deepspeed_is_imported_in_the_engine_room_alone() -> None:
    importing = {p for p in SOURCES if "deepspeed" in imports_of(p)}
    assert importing  # the walk sees them
    assert not [p for p in importing if p.parent != ROOT / "arvideo_ds" / "engine"]


def test_imports_keep_to_the_rooms(run: Run, tmp_path: Path) -> None:
    done = run("lint-imports", "--cache-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    "path", sorted((ROOT / "arvideo_ds").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_module_says_what_it_is_and_every_room_what_it_must_not_know(path: Path) -> None:
    says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert says, path
    if path.name == "__init__.py":
        assert len(says.splitlines()) > 1


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "arvideo_ds").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_files_of_tests_that_start_first_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_files_that_a_contributor_is_to_copy_and_run_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", page))
    assert len(named) > 20
    assert not [p for p in named if not ((ROOT / p).exists() or (ROOT / "arvideo_ds" / p).exists())]


def test_the_targets_that_ci_makes_exist_and_the_citation_has_the_version() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    targets = {row["target"] for row in workflow["jobs"]["make"]["strategy"]["matrix"]["include"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M)
    assert targets == {"lint", "fast", "slow", "docs"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == arvideo_ds.__version__


def test_the_container_files_copy_what_the_checkout_has_and_run_steps_that_exist() -> None:
    folder = ROOT / "container"
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    }
    steps = set(re.findall(r"^(\w+)\)$", (folder / "install.sh").read_text(), flags=re.M))
    dockerfile = (folder / "Dockerfile").read_text()
    definition = (folder / "arvideo_ds.def").read_text()
    copied = [
        word
        for line in re.findall(r"^COPY (.*) \S+$", dockerfile, flags=re.M)
        for word in line.split()
    ]
    listed = re.findall(r"^    (\S+) /opt/arvideo_ds/", definition, flags=re.M)
    assert len(copied) > 5 and len(listed) > 5
    assert not [path for path in copied + listed if not (ROOT / path).exists()]
    # Sources that .dockerignore excludes would end the build.
    assert not [p for p in copied if not {p, *map(str, Path(p).parents)} & allowed]
    assert set(re.findall(r"RUN container/install\.sh (\w+)", dockerfile)) == steps
    assert set(re.search(r"for step in (.*?);", definition)[1].split()) == steps  # type: ignore[index]
