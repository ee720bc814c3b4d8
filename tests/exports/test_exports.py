"""Exports: other programs compute what was trained, and the folder says what it is."""

from __future__ import annotations

import dataclasses
import json
import re
import stat
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arvideo_ds.config import Recipe
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.decoders import decode
from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.predictions import central_clip, top_labels
from arvideo_ds.exports import export as exporting
from arvideo_ds.exports.export import FORMATS, ParityClips, clips_of, export, random_clips
from arvideo_ds.exports.huggingface import _pipeline
from arvideo_ds.exports.source import ExportSource, architecture, outputs, read_source
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.encoder import build_encoder, encode_clips
from arvideo_ds.models.layouts import load_encoder
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.demo_set import render
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks.pretrain import build_objective
from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "scripts" / "export.py"
NEEDS = {"huggingface": ["transformers"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}
LABELS = ["north", "north-east", "east", "west / left"]
MakeSource = Callable[..., ExportSource]


@pytest.fixture
def make_source(
    tiny: Callable[..., Recipe], tiny_finetune: Callable[..., Recipe], tmp_path: Path
) -> MakeSource:
    """A finished run's folder with random weights, pretrained or fine-tuned, read back."""

    def make(kind: str = "pretrained", **sections: dict[str, object]) -> ExportSource:
        folder = tmp_path / "run"
        folder.mkdir()
        tuned = kind == "fine-tuned"
        torch.manual_seed(0)
        recipe = (tiny_finetune if tuned else tiny)(**sections)
        if tuned:
            pooling = {"pooling": recipe.pooling, "pooling_depth": recipe.pooling_depth}
            model = Classifier(recipe.encoder, len(LABELS), **pooling)
        else:
            model = build_objective(recipe)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        save_file(model.state_dict(), folder / "model.safetensors")
        run_folder.write_recipe(folder, recipe)
        if tuned:
            (folder / "labels.json").write_text(json.dumps(LABELS))
        summary = {"recipe": "/home/me/mine.yaml", "manifest": "abc123", "knn_accuracy": 0.75}
        final = {"loss/pretrain": 0.5, "time/step_s": 3.0}
        run_folder.update_summary(folder, {**summary, "final": final, "commit": "c0ffee"})
        (folder / "run.json").write_text(json.dumps({"versions": {"torch": "2.0"}}))
        return read_source(folder, run_folder.read_recipe(folder, Recipe))

    return make


@pytest.fixture
def demo_clips(demo_shards: Path, tiny: Callable[..., Recipe]) -> ParityClips:
    return clips_of(ShardSet(str(demo_shards / "train")), tiny())


def require(format_name: str) -> None:
    for library in NEEDS.get(format_name, []):
        pytest.importorskip(library)


@pytest.mark.parametrize("kind", ["pretrained", "fine-tuned"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_was_exported_computes_what_was_trained_on_real_clips(
    format_name: str, kind: str, make_source: MakeSource, demo_clips: ParityClips, tmp_path: Path
) -> None:
    require(format_name)
    source = make_source(kind)
    parity: Any = export(source, format_name, tmp_path / "out", demo_clips)
    assert parity == json.loads((tmp_path / "out" / "parity.json").read_text())
    compared = set(parity["max_abs_difference"])
    assert {"features"} | ({"logits"} if kind == "fine-tuned" else set()) <= compared
    limit = 1e-3 if format_name == "onnx" else 1e-4
    assert all(value <= limit for value in parity["max_abs_difference"].values()), parity
    # The outputs are no constants that would agree whatever the weights.
    assert outputs(source, demo_clips.values)["features"].std(0).mean() > 100 * limit
    assert parity["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "abs" not in parity["clips"] and "4 videos" in parity["clips"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_clips_need_not_be_square_nor_patches(
    format_name: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    data = {"frames": 6, "size": [32, 48]}
    source = make_source(
        model={"size": "tiny", "patch": [3, 4, 8]}, objective={"cluster": [1, 4, 3]}, data=data
    )
    export(source, format_name, tmp_path / "out", random_clips(source.recipe))


@pytest.mark.parametrize("format_name", ["encoder", "huggingface", "timm"])
def test_an_exported_encoder_loads_again(
    format_name: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    source = make_source()
    clips = random_clips(source.recipe)
    export(source, format_name, tmp_path / "out", clips)
    encoder = build_encoder(source.recipe.encoder).eval()
    report = load_encoder(encoder, tmp_path / "out", patch=source.recipe.patch)
    assert report.match == 1 and not report.notes
    with torch.no_grad():
        tokens = encode_clips(encoder, clips.values, source.recipe.patch)
    torch.testing.assert_close(tokens, outputs(source, clips.values)["tokens"])


def test_transformers_opens_a_classifier_with_its_labels_and_preprocessing(
    make_source: MakeSource, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = make_source("fine-tuned")
    export(source, "huggingface", tmp_path / "out", random_clips(source.recipe))
    model = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "out")
    assert [model.config.id2label[n] for n in range(len(LABELS))] == LABELS
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert processor["size"] == {"shortest_edge": 32}
    assert processor["crop_size"] == {"height": 32, "width": 32}
    # Names of the published files: versions 4 and 5 of transformers know them.
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "videomae.encoder.layer.0.attention.attention.q_bias" in names
    assert not [name for name in names if "key.bias" in name]


def test_an_onnx_model_takes_any_number_of_clips(make_source: MakeSource, tmp_path: Path) -> None:
    require("onnx")
    import onnxruntime

    source = make_source("fine-tuned")
    export(source, "onnx", tmp_path / "out", random_clips(source.recipe))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for count in (1, 5):
        clips = random_clips(source.recipe, count).values
        logits = session.run(["logits"], {"clips": clips.numpy()})[0]
        difference = torch.from_numpy(logits) - outputs(source, clips)["logits"]
        assert difference.abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("format_name", "settings"),
    [
        *((name, {"pooling": "attention"}) for name in ("encoder", "onnx", "timm")),
        ("onnx", {"pooling": "attentive", "pooling_depth": 2}),
        *((name, {"pooling": "motion"}) for name in ("encoder", "onnx")),
    ],
)
def test_the_pooling_leaves_with_the_model(
    format_name: str, settings: dict[str, object], make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    source = make_source("fine-tuned", finetune=settings)
    parity = export(source, format_name, tmp_path / "out", random_clips(source.recipe))
    assert {"features", "logits"} <= set(parity["max_abs_difference"])


def test_transformers_has_no_class_attention_layer(make_source: MakeSource, tmp_path: Path) -> None:
    require("huggingface")
    source = make_source("fine-tuned", finetune={"pooling": "attention"})
    with pytest.raises(
        UserError, match=r"classifies the mean of the tokens.*--format encoder, onnx or timm"
    ):
        export(source, "huggingface", tmp_path / "out", random_clips(source.recipe))


@pytest.mark.parametrize("pooling", ["attentive", "motion"])
@pytest.mark.parametrize("name", ["huggingface", "timm"])
def test_formats_without_a_pooling_name_those_with_it(
    name: str, pooling: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(name)
    source = make_source("fine-tuned", finetune={"pooling": pooling})
    with pytest.raises(UserError, match=rf"{pooling}.* Use --format encoder or onnx"):
        export(source, name, tmp_path / "out", random_clips(source.recipe))


SETS = {"verb": ["take", "put"], "noun": ["cup", "lid"]}


@pytest.mark.parametrize("format_name", FORMATS)
def test_two_label_sets_leave_with_the_model_but_not_to_transformers(
    format_name: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    source = make_source("fine-tuned", finetune={"heads": ["verb", "noun"]})
    (tmp_path / "run" / "labels.json").write_text(json.dumps(SETS))
    source = read_source(tmp_path / "run", source.recipe)
    out, clips = tmp_path / "out", random_clips(source.recipe)
    if format_name == "huggingface":
        with pytest.raises(UserError, match=r"one label for a video.*verb, noun"):
            export(source, format_name, out, clips)
        return
    assert "logits" in export(source, format_name, out, clips)["max_abs_difference"]
    assert json.loads((out / "config.json").read_text())["label_sets"] == {"verb": 2, "noun": 2}
    card = (out / "README.md").read_text()
    assert "2 verb classes and 2 noun classes" in card
    assert "`logits` are 2 of verb, then 2 of noun: a softmax for each set." in card
    if format_name == "encoder":
        assert read_source(out, run_folder.read_recipe(out, Recipe)).labels == SETS


def test_positions_that_videomae_does_not_have_are_refused_there_and_kept_elsewhere(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(model={"size": "tiny", "positions": "sincos_3d"})
    clips = random_clips(source.recipe)
    for format_name in ("encoder", "timm"):
        export(source, format_name, tmp_path / format_name, clips)
    require("huggingface")
    with pytest.raises(UserError, match=r"sincos_3d.*--format encoder, onnx or timm"):
        export(source, "huggingface", tmp_path / "out", clips)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "encoder", "timm"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_card_says_what_the_model_is_and_its_lines_of_python_run(
    format_name: str, make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(format_name)
    source = make_source("fine-tuned", data={"shards": "/home/me/secret/shards"})
    clips = random_clips(source.recipe)
    export(source, format_name, tmp_path / "out", clips)
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("mine.yaml", "abc123", "c0ffee", "knn_accuracy | 0.75", "torch 2.0", "size: tiny"):
        assert fact in card
    assert "loss/pretrain | 0.5" in card and "time/step_s" not in card
    written = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".md", ".json", ".yaml")]
    assert not [path for path in written if re.search("/home/me|secret", path.read_text())]
    python = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert python is not None and len(python[1].splitlines()) <= 4
    monkeypatch.chdir(tmp_path)
    names = {
        "folder": tmp_path / "out",
        "frames": list(clips.values[0].numpy()),
        "clips": clips.values.numpy(),
        "pixels": torch.zeros(1, 3, *source.recipe.geometry.clip),
    }
    exec(python[1], names)


RESULT = {"top1": 81.25, "top5": 95.5, "views": [5, 3], "manifest": "abc"}


@pytest.mark.parametrize("format_name", ["encoder", "huggingface"])
def test_hubs_read_the_card_and_find_the_results_of_the_exported_weights(
    format_name: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    hub = pytest.importorskip("huggingface_hub")
    source = make_source("fine-tuned", data={"shards": "/home/me/k400-train"})
    results = {
        "test_k400-val-last-5x3": {**RESULT, "weights": "last"},
        "test_k400-val-best-5x3": {**RESULT, "weights": "best", "top1": 99.0},
        "test_mine-2-last-1x1": {**RESULT, "weights": "last", "views": [1, 1], "top1": 50.0},
    }
    source = dataclasses.replace(source, summary={**source.summary, **results})
    out = tmp_path / "out"
    export(source, format_name, out, random_clips(source.recipe), license_id="cc-by-nc-4.0")
    card = hub.ModelCard((out / "README.md").read_text())
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.datasets == ["k400-train"]
    assert "arvideo_ds" in card.data.tags
    assert card.data.model_name == "out"
    found = [(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert found == [
        ("k400-val", "top-1 accuracy, %, 5x3 views", 81.25),
        ("k400-val", "top-5 accuracy, %, 5x3 views", 95.5),
        ("mine-2", "top-1 accuracy, %, 1x1 views", 50.0),
        ("mine-2", "top-5 accuracy, %, 1x1 views", 95.5),
    ]
    if format_name == "huggingface":
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "video-classification"


def test_a_card_has_no_results_that_were_not_measured_and_leaves_the_licence_open(
    make_source: MakeSource, tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = make_source("fine-tuned")
    export(source, "encoder", tmp_path / "out", random_clips(source.recipe))
    card = hub.ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.license == "other" and "Not chosen yet" in card.text
    assert not card.data.eval_results and "model-index" not in card.content


def test_named_probes_of_an_encoder_are_results(make_source: MakeSource, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = make_source()
    probes = {"probes": {"hmdb51": {"linear_probe_accuracy": 0.5}}}
    source = dataclasses.replace(source, summary={**source.summary, **probes})
    export(source, "encoder", tmp_path / "out", random_clips(source.recipe))
    (result,) = hub.ModelCard((tmp_path / "out" / "README.md").read_text()).data.eval_results
    assert (result.dataset_name, result.metric_value) == ("hmdb51", 50.0)


def test_the_card_says_how_the_pipeline_samples_beside_our_evaluation(
    make_source: MakeSource, tmp_path: Path
) -> None:
    require("huggingface")
    source = make_source("fine-tuned", data={"stride": 4}, evaluation={"views": [5, 3]})
    export(source, "huggingface", tmp_path / "out", random_clips(source.recipe))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "floor(i x n / 8) of n" in card and "every 4th, 5 x 3 views" in card
    assert 'pipeline("video-classification", model="out")' in card
    assert "fewer than 8 frames is an error of the pipeline" in card


def test_exports_of_clips_at_a_rate_say_so(make_source: MakeSource) -> None:
    source = make_source("fine-tuned", data={"stride": None, "fps": 7.5})
    facts = architecture(source)
    assert facts["fps"] == 7.5 and "stride" not in facts
    assert "arvideo_ds: 7.5 per second" in _pipeline(source)


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 21])
def test_the_pipeline_of_transformers_gives_our_probabilities_on_the_same_frames(
    length: int, make_source: MakeSource, tmp_path: Path
) -> None:
    """Real H.264 files; of 8 frames the pipeline's clip is also that of scripts/predict.py."""
    transformers = pytest.importorskip("transformers")
    usable = pytest.importorskip("transformers.utils").is_torchcodec_usable
    if not usable(decode="video"):
        pytest.skip("transformers' pipeline decodes with torchcodec and FFmpeg's libraries")
    source = make_source("fine-tuned")
    export(source, "huggingface", tmp_path / "out", random_clips(source.recipe))
    frames = [render(3, np.random.default_rng(number))[:8] for number in range(3)]
    pictures = np.concatenate(frames)[:length]
    images = (
        av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        for picture in pictures
    )
    path = tmp_path / "video.mp4"
    path.write_bytes(encode(images, rate=Fraction(12), settings=TranscodeSettings(short_side=0)))
    pipeline = transformers.pipeline("video-classification", model=str(tmp_path / "out"))
    theirs = {found["label"]: found["score"] for found in pipeline(str(path), top_k=len(LABELS))}
    indices = np.arange(8) * length // 8
    decoded = decode("pyav", path.read_bytes(), indices)
    clip = cut(decoded, view_crop(*decoded.shape[1:3], (32, 32)), (32, 32), flip=False)
    if length == 8:
        assert torch.equal(clip, central_clip(path, source.recipe.data))
    assert isinstance(source.model, Classifier)
    ours = dict(top_labels(source.model, LABELS, clip, len(LABELS)))
    assert next(iter(theirs)) == next(iter(ours))
    assert theirs == pytest.approx(ours, abs=0.01)
    # Another clip gives something else, so the agreement is one on these frames.
    other = dict(top_labels(source.model, LABELS, clip.flip(0), len(LABELS)))
    assert max(abs(other[label] - ours[label]) for label in LABELS) > 0.01


def test_a_folder_in_use_is_left_alone(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    with pytest.raises(UserError, match="is there already"):
        export(source, "encoder", tmp_path / "run", random_clips(source.recipe))


def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source()

    def wrong(source: ExportSource, folder: Path) -> object:
        right = FORMATS["encoder"](source, folder)
        off = {"features": torch.full((4, 128), torch.nan)}
        return dataclasses.replace(right, run=lambda clips: off)

    monkeypatch.setattr(exporting, "FORMATS", {"wrong": wrong})
    with pytest.raises(UserError, match="features differ from the run's by nan"):
        export(source, "wrong", tmp_path / "out", random_clips(source.recipe))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(("format_name", "library"), [(f, lib) for f in NEEDS for lib in NEEDS[f]])
def test_a_missing_library_is_answered_with_how_to_install_it(
    format_name: str,
    library: str,
    make_source: MakeSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_source()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[export]'")):
        export(source, format_name, tmp_path / "out", random_clips(source.recipe))


def test_exported_weights_are_readable_like_any_file(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source()
    export(source, "encoder", tmp_path / "out", random_clips(source.recipe))
    weights, card = (tmp_path / "out" / name for name in ("model.safetensors", "README.md"))
    assert stat.S_IMODE(weights.stat().st_mode) == stat.S_IMODE(card.stat().st_mode)


def test_weights_of_another_recipe_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("fine-tuned")
    (tmp_path / "run" / "labels.json").write_text(json.dumps(LABELS[:2]))
    with pytest.raises(UserError, match="2 labels"):
        read_source(tmp_path / "run", source.recipe)
    (tmp_path / "run" / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="list of class names"):
        read_source(tmp_path / "run", source.recipe)


@pytest.mark.slow
def test_the_script_exports_a_run_and_says_what_it_measured(
    make_source: MakeSource,
    demo_shards: Path,
    tmp_path: Path,
) -> None:
    make_source("fine-tuned")
    where = ("--output", tmp_path / "out", "--shards", demo_shards / "test")
    done = run_script(SCRIPT, tmp_path / "run", "--format", "timm", *where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_abs_difference"]["logits"] <= 1e-4
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_refused_in_one_paragraph(
    make_source: MakeSource, tmp_path: Path
) -> None:
    make_source()
    (tmp_path / "run" / "model.safetensors").unlink()
    where = ("--output", tmp_path / "out")
    done = run_script(SCRIPT, tmp_path / "run", "--format", "encoder", *where)
    assert done.returncode == 2 and done.stdout == ""
    assert "not finished" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_name", ["encoder", "onnx", "timm"])
def test_interpolated_positions_leave_with_the_model(
    format_name: str, make_source: MakeSource, tmp_path: Path
) -> None:
    require(format_name)
    transfer = {"positions": "interpolated", "pretrained_clip": [4, 64, 64]}
    source = make_source("fine-tuned", finetune=transfer)
    parity = export(source, format_name, tmp_path / "out", random_clips(source.recipe))
    assert "logits" in parity["max_abs_difference"]
    if format_name == "encoder":
        again = read_source(tmp_path / "out", run_folder.read_recipe(tmp_path / "out", Recipe))
        assert torch.equal(again.encoder.positions, source.encoder.positions)
