"""A checkpoint of any stage and number of ranks goes on at any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from arvideo_ds.engine.saved_state import SavedState

pytestmark = pytest.mark.dist


def values(folder: Path) -> dict[tuple[str, str], Tensor]:
    (checkpoint,) = folder.glob("step-*")
    saved = SavedState(checkpoint)
    assert saved.kinds == ["average", "exp_avg", "exp_avg_sq", "weight"]
    return {
        (name, kind): saved.read(
            name, kind, 0, shape[0] if len(shape) == 1 else shape[0] * shape[1]
        )
        for name, shape in saved.shapes.items()
        for kind in saved.kinds
    }


def largest_difference(left: Path, right: Path) -> float:
    first, second = values(left), values(right)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


def test_state_is_the_same_bits_at_every_stage_and_number_of_ranks(
    on_ranks: Callable[..., None], folder: Path
) -> None:
    on_ranks("reshape.py", 2, "save", folder)
    for ranks in (1, 2, 3):
        on_ranks("reshape.py", ranks, "load", folder)
    loaded = sorted(folder.glob("*-to-*"))
    assert len(loaded) == (4 * 4 + 3 * 3 + 2 * 2) * 3
    for path in loaded:
        source = folder / "source" / path.name.partition("-to-")[0]
        assert largest_difference(path, source) == 0, path.name


def test_the_next_step_is_the_one_that_would_have_come(folder: Path) -> None:
    for path in sorted(folder.glob("*-to-*")):
        source = folder / "source" / path.name.partition("-to-")[0]
        # The half-precision weights follow the fp32 ones; other sums of gradients are rounded.
        allowed = 1e-6 if "fp32" in path.name else 2e-2
        assert largest_difference(path / "next", source / "next") <= allowed, path.name
