"""Pictures: what is drawn as kept, given, predicted and new is exactly that."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation import pictures, report
from arvideo_ds.models.arvideo import ARVideo
from arvideo_ds.models.cubes import from_cubes, pick, pixel_targets
from arvideo_ds.models.objective import Draw, Objective
from arvideo_ds.tasks.pretrain import build_objective

KEY = 12345
Tiny = Callable[..., PretrainRecipe]


@pytest.fixture
def clip() -> Tensor:
    # 0.82 x 255 = 209.1: no pixel of a clip can be mistaken for a blank one.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)


def untrained(recipe: PretrainRecipe) -> ARVideo:
    torch.manual_seed(0)
    return build_objective(recipe).eval()


def pixels_of(tokens: Tensor, model: Objective, recipe: PretrainRecipe) -> np.ndarray:
    """True (T H W) on the pixels of the given tokens."""
    geometry = recipe.geometry
    marks = torch.zeros(1, geometry.num_tokens, geometry.cube_values)
    marks[0, tokens] = 1
    return np.asarray(from_cubes(marks, model.patch, geometry.grid)[0, ..., 0] > 0)


@pytest.mark.parametrize("targets", ["shifted", "paper"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_pixel_shows_what_it_is_said_to_show(
    targets: str, normalize: bool, tiny: Tiny, clip: Tensor
) -> None:
    recipe = tiny(objective={"targets": targets, "normalize_targets": normalize})
    model = untrained(recipe)
    shown = pictures.predict_clip(model, clip, KEY, recipe)
    draw, original = model.draw(torch.tensor([KEY])), clip.numpy() / 255
    blank = np.float32(pictures.BLANK)
    np.testing.assert_allclose(shown.original, original, atol=1e-6)

    kept = pixels_of(draw.encoded[0], model, recipe)
    np.testing.assert_allclose(shown.kept[kept], original[kept], atol=1e-6)
    assert (shown.kept[~kept] == blank).all()

    done = pixels_of(model.clusters[draw.order[0, 0]], model, recipe)
    given = done.copy()
    steps = zip(shown.after_step, shown.newest, strict=True)
    for step, (picture, newest) in enumerate(steps, start=1):
        # Step by step, one whole cluster more, in the drawn order.
        cluster = pixels_of(model.clusters[draw.order[0, step]], model, recipe)
        np.testing.assert_array_equal(newest, cluster)
        assert not (done & newest).any()
        done |= newest
        np.testing.assert_allclose(picture[given], original[given], atol=1e-6)
        assert (picture[~done] == blank).all()
    assert step == recipe.objective.steps_predicted(recipe.geometry)
    left = recipe.geometry.num_clusters - 1 - step
    assert (~done).sum() == left * given.sum()
    assert shown.after_step[-1].min() >= 0
    assert shown.after_step[-1].max() <= 1


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_model_draws_the_clip(normalize: bool, tiny: Tiny, clip: Tensor) -> None:
    recipe = tiny(objective={"normalize_targets": normalize})
    model = untrained(recipe)

    def perfect(cubes: Tensor, draw: Draw) -> Tensor:
        return pixel_targets(pick(cubes, draw.targets), normalize=normalize)

    model.predict = perfect  # type: ignore[method-assign]
    shown = pictures.predict_clip(model, clip, KEY, recipe)
    np.testing.assert_allclose(shown.after_step[-1], clip.numpy() / 255, atol=1e-5)


@pytest.mark.parametrize("decoder_mask", ["none", "running_cell"])
def test_videomae_shows_what_it_sees_and_what_it_predicts(
    decoder_mask: str, tiny: Tiny, clip: Tensor
) -> None:
    recipe = tiny(objective={"name": "videomae", "decoder_mask": decoder_mask})
    model = build_objective(recipe).eval()
    draw = model.draw(torch.tensor([KEY]))

    def perfect(cubes: Tensor, draw: Draw) -> Tensor:
        return pixel_targets(pick(cubes, draw.targets), normalize=True)

    model.predict = perfect  # type: ignore[method-assign]
    shown = pictures.predict_clip(model, clip, KEY, recipe)
    (picture,), (newest,) = shown.after_step, shown.newest
    predicted = pixels_of(draw.targets[0], model, recipe)
    there = predicted | pixels_of(draw.encoded[0], model, recipe)
    np.testing.assert_array_equal(newest, predicted)
    np.testing.assert_allclose(picture[there], (clip.numpy() / 255)[there], atol=1e-5)
    assert (picture[~there] == np.float32(pictures.BLANK)).all()
    assert there.all() == (decoder_mask == "none")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    plt.close(figure)
    return buffer.getvalue()


def test_figures_render(tiny: Tiny, clip: Tensor) -> None:
    recipe = tiny(objective={"cluster": [1, 4, 4]}, data={"frames": 2})
    shown = pictures.predict_clip(untrained(recipe), clip[:2], KEY, recipe)
    metrics = [{"step": s, "loss/pretrain": 1 / s, "lr": 1e-3} for s in (1, 2, 3)]
    probes = {
        "linear_probe_accuracy": 0.9,
        "knn_accuracy": 0.8,
        "untrained_linear_probe_accuracy": 0.3,
        "untrained_knn_accuracy": 0.2,
        "probe_chance_accuracy": 0.125,
    }
    for figure in (
        pictures.draw_prediction(shown, "clip 0"),
        pictures.draw_loss(metrics),
        pictures.draw_loss(metrics[:1]),
        pictures.draw_probes(probes),
    ):
        assert png(figure).startswith(b"\x89PNG")


def test_a_report_shows_names_as_text_and_needs_no_other_file(tmp_path: Path) -> None:
    evil, before = "<script>alert('{x}')</script>&", plt.get_fignums()
    parts = [
        report.table([(evil, evil)]),
        report.Section(
            evil, evil, [pictures.draw_loss([{"step": 1, "loss/pretrain": 1, "lr": 1}])]
        ).html(),
    ]
    report.write_page(tmp_path / "report.html", evil, parts)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7  # title twice, row twice, heading, note, alt text
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 1
    assert "href" not in page
    assert plt.get_fignums() == before
