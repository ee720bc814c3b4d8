"""What is said of a tokenizer: PSNR and SSIM by hand, and where it looks on the motion set."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arvideo_ds.config import TokenizerRecipe, load_recipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pictures import draw_rows
from arvideo_ds.geometry import Geometry
from arvideo_ds.long_video.quality import (
    measured,
    motion_clip,
    object_share,
    picture_rows,
    untrained,
)
from arvideo_ds.long_video.tokenizer import Reconstruction
from arvideo_ds.models.cubes import to_cubes, unit_pixels
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.demo_set import render, render_scene, scene
from tests.conftest import ROOT


def demo(*overrides: str) -> TokenizerRecipe:
    return load_recipe("tokenizer_demo", overrides, TokenizerRecipe)


def test_psnr_and_ssim_of_known_errors_and_codes_stay_exact() -> None:
    clips = torch.randint(60, 190, (2, 4, 16, 16, 3), dtype=torch.uint8)
    pixels = unit_pixels(clips)
    pixels[0] += 0.1  # 20 dB
    pixels[1] += 0.01 * torch.tensor([1.0, -1.0]).repeat(8)[:, None]  # 40 dB
    codes = torch.full((2, 2, 4, 4), 2**18 - 1)
    values = measured(Reconstruction(pixels, codes, codes), clips)
    assert values[:, 0].tolist() == pytest.approx([20, 40], abs=1e-3)
    assert 0.9 < values[1, 1] < 1
    assert values[:, 2:].long().unique().tolist() == [2**18 - 1]
    same = measured(Reconstruction(unit_pixels(clips), codes, codes), clips)
    assert same[:, 1].tolist() == pytest.approx([1, 1], abs=1e-4)


def test_the_shapes_cover_is_where_the_video_changes_and_the_video_is_what_it_was() -> None:
    frames, cover = scene("test", 3)
    generator = np.random.default_rng((1, 3))
    assert np.array_equal(frames, render(3, generator))
    assert cover.shape == (*frames.shape[:3], 1)
    free = (cover == 0).all(axis=0)[..., 0]
    assert (frames[:, free] == frames[:1, free]).all()
    assert not (frames == frames[:1]).all()
    # Another draw of the same generator follows as it always did.
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    render(0, one), render_scene(0, two)
    assert one.random() == two.random()


class Looking:
    """A tokenizer that gives the importance it is told."""

    patch = (2, 4, 4)

    def __init__(self, importance: Any) -> None:
        self.importance = importance

    def tokens(self, windows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.importance(windows), None


def test_the_share_of_the_shape_tells_a_good_scorer_from_a_random_one() -> None:
    recipe = demo()
    grid = Geometry.whole(recipe.clip, recipe.patch).grid
    number = iter(range(100))

    def knows(_: torch.Tensor) -> torch.Tensor:
        cover = motion_clip(recipe, next(number))[1]
        return to_cubes(cover[None], recipe.patch).mean(2).view(1, *grid)

    best = object_share(Looking(knows), recipe, videos=20)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    random = object_share(
        Looking(lambda _: torch.rand(1, *grid, generator=generator)),  # type: ignore[arg-type]
        recipe,
        videos=20,
    )
    assert best.all == random.all
    assert 0.03 < best.all < 0.2
    assert best.times_random > 5
    assert random.times_random == pytest.approx(1, abs=0.25)


def test_a_clip_that_spans_more_than_the_motion_sets_videos_is_refused() -> None:
    with pytest.raises(UserError, match="have 12 frames"):
        motion_clip(demo("data.frames=16"), 0)


def test_the_picture_shows_four_rows_of_every_clip() -> None:
    recipe = demo("tokenizer.filters=4")
    tokenizer = untrained(recipe)
    rows = [row for n in range(2) for row in picture_rows(tokenizer, motion_clip(recipe, n)[0])]
    pictures = {label: picture for label, picture, _ in rows[:4]}
    assert pictures["original"].shape == pictures["tokens kept"].shape == (8, 32, 32, 3)
    assert pictures["importance"].max() == pytest.approx(1)
    figure = draw_rows(rows, "two clips")
    assert len(figure.axes) == 2 * 4 * 8


@pytest.mark.parametrize(
    ("count", "overrides", "said"),
    [("-1", [], "--motion -1 must be"), ("2", ["data.frames=16"], "have 12 frames")],
)
def test_a_motion_that_cannot_be_looked_at_is_refused_before_anything_is_reconstructed(
    tmp_path: Path,
    demo_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: str,
    overrides: list[str],
    said: str,
) -> None:
    shards = demo_shards / "test"
    recipe = demo("tokenizer.filters=4", f"evaluation.shards={shards}", *overrides)
    run_folder.write_recipe(tmp_path, recipe)
    save_file(untrained(recipe).state_dict(), tmp_path / run_folder.MODEL)
    monkeypatch.setattr("arvideo_ds.long_video.quality.judge_run", None)  # a call would fail
    monkeypatch.setattr("sys.argv", ["evaluate_tokenizer.py", str(tmp_path), f"--motion={count}"])
    script = runpy.run_path(str(ROOT / "scripts" / "evaluate_tokenizer.py"))
    assert script["main"]() == 2
    assert said in capsys.readouterr().err
