"""Public classifiers: the logits of the library that wrote them, on clips of real video files."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arvideo_ds
from arvideo_ds.arguments import required_model
from arvideo_ds.cli import export as export_command
from arvideo_ds.cli import features as features_command
from arvideo_ds.cli import predict as predict_command
from arvideo_ds.config.sizes import SIZES
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.decoders import choose_decoder, count_frames, decode
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.public import (
    NO_OPTIONS,
    PublicOptions,
    _recipe,
    class_numbers,
    read_label_file,
    read_public,
)
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.layouts import ClassifierShape
from arvideo_ds.models.weight_files import read_weights
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.evaluate import evaluate_public
from tests.conftest import run_script
from tests.models.test_layouts import as_transformers, as_videomae, randomized

NANO = {"frames": 8, "side": 32, "patch": 4}
OVERRIDES = ["data.stride=1", "evaluation.views=[2,3]", "data.workers=0"]
CLIP = [f"data.frames={NANO['frames']}", f"data.size={NANO['side']}"]
OTHER_PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}


@pytest.fixture(scope="module")
def names(demo_shards: Path) -> list[str]:
    """The classes of the demo's shards, in another order than there."""
    return list(reversed(ShardSet(demo_shards / "test").manifest.labels or ()))


@pytest.fixture(scope="module")
def video(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test video as a file."""
    with tarfile.open(sorted((demo_shards / "test").glob("*.tar"))[0]) as tar:
        content = tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(".mp4")))
        assert content is not None
        path = tmp_path_factory.mktemp("video") / "clip.mp4"
        path.write_bytes(content.read())
    return path


def library_model(folder: Path, size: str, names: list[str], *, side: int, **pixels: Any) -> Any:
    """A random VideoMAEForVideoClassification, saved by transformers with its preprocessing."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    shape = SIZES[size]
    config = transformers.VideoMAEConfig(
        image_size=side,
        patch_size=shape.patch,
        num_frames=8 if size == "nano" else 16,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    torch.manual_seed(0)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # the biases too, which are zero at first
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    transformers.VideoMAEImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **pixels
    ).save_pretrained(folder)
    return model


@torch.no_grad()
def library_logits(model: Any, folder: Path, frames: np.ndarray) -> Tensor:
    """Logits of decoded frames T H W 3, with the library's preprocessing."""
    import transformers

    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    return model(**processor(list(frames), return_tensors="pt")).logits[0]


def library_pixels(folder: Path, frames: np.ndarray) -> Tensor:
    """Pixels T h w 3 from 0 to 1, as the library resizes and crops decoded frames T H W 3."""
    import transformers

    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    pixels = processor(list(frames), do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return pixels.permute(0, 2, 3, 1)


def decoded(video: Path, frames: int, stride: int) -> np.ndarray:
    """The frames of the central clip, as they are in the file."""
    decoder, content = choose_decoder("auto"), video.read_bytes()
    return decode(
        decoder, content, view_frames(count_frames(decoder, content), frames, stride, "dense")
    )


@pytest.fixture(scope="module")
def library(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model of the library, and its folder."""
    folder = tmp_path_factory.mktemp("library")
    return library_model(folder, "nano", names, side=NANO["side"], **OTHER_PIXELS), folder


@pytest.fixture(scope="module")
def layouts(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Classifier, dict[str, Path]]:
    """A classifier, and files of its weights in the layouts of VideoMAE and VideoMAE V2."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "names.txt").write_text("\n".join(names))
    recipe = read_recipe_of("nano")
    torch.manual_seed(0)
    model = randomized(Classifier(recipe.encoder, len(names))).eval()
    # The published models have no key bias.
    for block in model.encoder.blocks:
        block.attn.qkv.bias.data.view(3, -1)[1] = 0
    state = as_videomae(model.state_dict(), recipe.patch)
    joined = {n: v for n, v in state.items() if not n.endswith(("q_bias", "v_bias"))}
    joined |= {
        f"blocks.{n}.attn.qkv.bias": block.attn.qkv.bias.data
        for n, block in enumerate(model.encoder.blocks)
    }
    trees = {
        "VideoMAE": {"model": state, "epoch": 74},
        "VideoMAE V2": {"module": state},
        "wrapped": {"state_dict": {f"module.model.{n}": value for n, value in state.items()}},
        "one bias of queries, keys and values": joined,
    }
    for name, tree in trees.items():
        torch.save(tree, folder / f"{name}.pth")
    return model, {name: folder / f"{name}.pth" for name in trees}


def read_recipe_of(size: str) -> Any:
    shape = SIZES[size]
    patch = (2, shape.patch, shape.patch)
    facts = ClassifierShape(shape.width, shape.depth, shape.mlp, patch, 8)
    clip = CLIP if size == "nano" else []
    return _recipe(Path("x.pth"), facts, None, None, [*OVERRIDES, *clip])[0]


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """A command in this process."""
    monkeypatch.setattr(sys, "argv", ["arvideo", *map(str, arguments)])
    return command.main()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers_gives_the_library_s_logits_preprocessing_included(
    file: str, library: tuple[Any, Path], video: Path, names: list[str], tmp_path: Path
) -> None:
    model, folder = library
    if file == "pytorch_model.bin":  # as older versions wrote it
        torch.save(load_file(folder / "model.safetensors"), tmp_path / file)
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_text((folder / name).read_text())
        folder = tmp_path
    classifier = arvideo_ds.load_classifier(folder, overrides=OVERRIDES)
    assert classifier.labels == tuple(names)
    expected = library_logits(model, folder, decoded(video, NANO["frames"], 1))
    found = classifier(classifier.clip(video)[None])[0]
    assert expected.std() > 0.1  # the outputs depend on the input
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "layout", ["VideoMAE", "VideoMAE V2", "wrapped", "one bias of queries, keys and values"]
)
def test_files_of_videomae_and_v2_give_the_same_logits(
    layout: str, layouts: tuple[Classifier, dict[str, Path]], names: list[str], video: Path
) -> None:
    model, files = layouts
    labels = files[layout].with_name("names.txt")
    again = arvideo_ds.load_classifier(files[layout], labels=labels, overrides=[*OVERRIDES, *CLIP])
    clip = again.clip(video)[None]
    assert torch.equal(again(clip), model(clip))
    assert again.labels == tuple(names)


def test_a_test_renumbers_classes_by_name_and_records_its_settings(
    library: tuple[Any, Path],
    demo_shards: Path,
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, folder = library
    public = read_public(folder, PublicOptions(overrides=OVERRIDES))
    where = demo_shards / "test"
    result = evaluate_public(public, str(where), tmp_path / "out", alone=True)
    (scores,) = (load_file(path) for path in (tmp_path / "out").rglob("*.safetensors"))
    shards = ShardSet(where)
    # The library on the same views, averaged after the softmax.
    views = EvaluationClips(shards, public.recipe, views=(2, 3))
    for number in (0, 17):
        logits = [library_logits(model, folder, clip.numpy()) for clip in views[number].clips]
        expected = torch.stack(logits).softmax(1).mean(0)
        torch.testing.assert_close(scores["probabilities"][number], expected, rtol=0, atol=1e-5)
    # Numbers of the model, by name.
    theirs = shards.manifest.labels or ()
    samples = [
        sample for n in range(len(shards.manifest.shards)) for sample in shards.index(n).samples
    ]
    assert [names[n] for n in scores["labels"]] == [theirs[sample.label] for sample in samples]
    top1 = (scores["probabilities"].argmax(1) == scores["labels"]).double().mean()
    assert result["top1"] == pytest.approx(100 * float(top1))
    assert list(result["per_class"]) == names
    settings = result["public"]["settings"]
    assert settings["data.frames"] == {"value": 8, "from": "config.json"}
    assert settings["data.test_short_side"]["from"] == "preprocessor_config.json"
    assert settings["pixels.std"]["value"] == pytest.approx(OTHER_PIXELS["image_std"])
    assert settings["data.stride"] == {"value": 1, "from": "given"}
    assert settings["data.sampling"]["from"].startswith("VideoMAE's test")
    printed = capsys.readouterr().out
    assert all(f"  {key} " in printed for key in settings)
    assert "in another order, renumbered by name" in printed
    assert result["classes"].startswith("in another order")


def test_a_prediction_is_the_library_s(
    library: tuple[Any, Path],
    video: Path,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, folder = library
    run(predict_command, monkeypatch, video, "--model", folder, "--override", "data.stride=1")
    expected = library_logits(model, folder, decoded(video, NANO["frames"], 1)).softmax(0)
    best = ((names[n], float(expected[n])) for n in expected.argsort(descending=True)[:5])
    line = "   ".join([str(video), *(f"{name} {share:.3f}" for name, share in best)])
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_features_are_the_mean_of_the_library_s_tokens(
    library: tuple[Any, Path], video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = library
    options = ["--model", folder, "--output", tmp_path / "out", "--workers", "0"]
    run(features_command, monkeypatch, video, *options, "--override", "data.stride=1")
    (path,) = (tmp_path / "out").rglob("*.npz")
    found = np.load(path)
    first = int(found["start_frame"][0])
    decoder, content = choose_decoder("auto"), video.read_bytes()
    frames = decode(decoder, content, first + np.arange(NANO["frames"]))
    tokens: list[Tensor] = []
    model.videomae.register_forward_hook(lambda *call: tokens.append(call[2].last_hidden_state))
    library_logits(model, folder, frames)
    expected = tokens[0][0].mean(0).numpy()
    np.testing.assert_allclose(found["features"][0], expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["public"]["data.stride"] == {"value": 1, "from": "given"}


def test_an_export_of_a_public_model_computes_the_same(
    layouts: tuple[Classifier, dict[str, Path]],
    video: Path,
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = layouts[1]["VideoMAE"]
    labels = path.with_name("names.txt")
    overrides = [*OVERRIDES, *CLIP, "pixels.mean=[0.4,0.5,0.6]", "pixels.std=[0.3,0.2,0.1]"]
    options = [f"--override={override}" for override in overrides]
    arguments = ["--model", path, "--labels", labels, "--output", tmp_path / "out"]
    run(export_command, monkeypatch, *arguments, "--format=encoder", *options)
    first = arvideo_ds.load_classifier(path, labels=labels, overrides=overrides)
    second = arvideo_ds.load_classifier(tmp_path / "out")
    clip = first.clip(video)[None]
    assert torch.equal(first(clip), second(clip))
    assert list(second.labels) == names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted by arvideo_ds from VideoMAE.pth" in card and "trained with arv" not in card
    plain = arvideo_ds.load_classifier(path, labels=labels, overrides=[*OVERRIDES, *CLIP])
    assert not torch.allclose(plain(clip), first(clip), atol=1e-2)  # the normalisation counts


def test_the_library_opens_an_export_of_its_own_model(
    library: tuple[Any, Path],
    video: Path,
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its other mean and deviation are part of the exported weights."""
    model, folder = library
    output = ["--output", tmp_path / "out", "--override=data.stride=1"]
    run(export_command, monkeypatch, "--model", folder, "--format=huggingface", *output)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    frames = decoded(video, NANO["frames"], 1)
    found, expected = (
        library_logits(again, tmp_path / "out", frames),
        library_logits(model, folder, frames),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert [again.config.id2label[n] for n in range(len(names))] == names


@pytest.mark.parametrize(
    ("run", "model", "words"),
    [(None, None, "give one model"), ("a", "b", "a and --model b are two")],
)
def test_one_model_is_required(run: Path | None, model: Path | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        required_model(argparse.Namespace(run=run, model=model))


def test_options_of_public_models_are_refused_for_runs() -> None:
    with pytest.raises(UserError, match=r"runs/x is a run.*--override are for public models"):
        PublicOptions(overrides=["data.stride=1"]).require_unused(Path("runs/x"))


def test_wide_frames_are_resized_before_or_after_the_crop(tmp_path: Path) -> None:
    """The library resizes the frame and crops; here the box is cut and resized. A square frame
    gives the same pixels, another one nearly."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    transformers.VideoMAEImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    coarse = np.random.default_rng(0).integers(0, 256, (1, 12, 16, 3), dtype=np.uint8)
    for height, width, exact in ((96, 96, True), (96, 128, False), (90, 161, False)):
        frames = cut(coarse, view_crop(12, 16, (height, width)), (height, width), flip=False)
        ours = cut(frames.numpy(), view_crop(height, width, (32, 32)), (32, 32), flip=False)
        difference = (255 * library_pixels(tmp_path, frames.numpy()) - ours).abs().mean()
        by_a_pixel = (ours.float().roll(1, dims=2) - ours).abs().mean()
        assert difference < (1e-4 if exact else 0.4) * by_a_pixel


@pytest.mark.parametrize("size", ["S", "B", "L", "H", "g", "G"])
def test_the_shapes_of_tensors_give_size_patch_and_published_clip(size: str) -> None:
    recipe = read_recipe_of(size)
    assert recipe.model.size == size and recipe.clip == (16, 224, 224)
    assert recipe.patch == (2, *2 * (14 if size in "gG" else 16,))
    assert recipe.data.sampling == "dense" and recipe.model.positions == "sincos_1d"


def test_another_clip_than_that_of_the_library_has_its_positions_interpolated(
    library: tuple[Any, Path],
) -> None:
    public = read_public(library[1], PublicOptions(overrides=["data.frames=16"]))
    assert public.recipe.pretrained_clip == (8, 32, 32)
    assert public.settings["finetune.positions"] == ("interpolated", "given")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "riding a bike\nmarching\ndodgeball"),
        ("a.csv", "id,name\n2,dodgeball\n0,riding a bike\n1,marching\n"),
        ("a.json", '["riding a bike", "marching", "dodgeball"]'),
        ("b.json", '{"riding a bike": "0", "dodgeball": "2", "marching": "1"}'),
        ("c.json", '{"\\"riding a bike\\"": 0, "\\"marching\\"": 1, "\\"dodgeball\\"": 2}'),
        ("d.json", '{"0": "riding a bike", "1": "marching", "2": "dodgeball"}'),
    ],
)
def test_label_files_of_several_projects(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_label_file(tmp_path / name) == ("riding a bike", "marching", "dodgeball")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "a\nb\na", "has the class 'a' twice"),
        ("a.csv", "0,a\n1,b\n", "needs the columns id and name"),
        ("a.json", '{"a": 0, "b": 2}', "are not 0 to 1"),
        ("a.json", '{"a": "b"}', "not a number and a name"),
        ("a.json", "3", "must be a list of class names"),
        ("a.txt", None, "cannot read .*a.txt"),
    ],
)
def test_wrong_label_files_are_explained(
    name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_label_file(tmp_path / name)


def test_classes_are_found_by_name() -> None:
    model = ["Riding a bike", "massaging person's head", "march"]
    assert class_numbers(model, "m", ["march", "riding_a_bike"], "s") == [2, 0]
    # Names that only punctuation tells apart are compared as they are.
    assert class_numbers(["a b", "ab"], "m", ["ab", "a b"], "s") == [1, 0]
    with pytest.raises(
        UserError, match=r"1 of the 2 classes of s .* 3 of m: 'swim'; the model has"
    ):
        class_numbers(model, "m", ["march", "swim"], "s")
    with pytest.raises(UserError, match="no class names"):
        class_numbers(model, "m", None, "s")


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(model_type="timesformer"), "model_type='timesformer'"),
        (lambda c: c.update(use_mean_pooling=False), "use_mean_pooling=False.*first token"),
        (lambda c: c.update(num_attention_heads=4), "has 4 attention heads, model.size=nano has 2"),
        (lambda c: c.update(hidden_act="relu"), "hidden_act='relu'"),
        (lambda c: c.update(layer_norm_eps=0.1), "layer_norm_eps=0.1"),
        (lambda c: c.update(id2label={"0": "a"}), "has 1 class names .* 8 classes"),
        (lambda c: c.pop("id2label"), "does not name its 8 classes: give --labels"),
        (lambda c: c.update(image_size="big"), "image_size"),
    ],
)
def test_a_folder_that_is_another_model_is_refused(
    change: Change, words: str, layouts: Any, names: list[str], tmp_path: Path
) -> None:
    state = as_transformers(layouts[0].state_dict(), layouts[0].patch)
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "model.safetensors")
    config: dict[str, Any] = {
        "model_type": "videomae",
        "num_frames": 8,
        "image_size": 32,
        "num_attention_heads": 2,
        "id2label": dict(enumerate(names)),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _ = read_public(tmp_path)
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        read_public(tmp_path)


def test_wrong_files_and_options_are_explained(
    layouts: Any, names: list[str], tmp_path: Path
) -> None:
    path = layouts[1]["VideoMAE"]
    state = read_weights(path)

    def refused(name: str, tree: dict[str, Any], words: str) -> None:
        torch.save(tree, tmp_path / name)
        with pytest.raises(UserError, match=words):
            read_public(tmp_path / name)

    without_head = {n: v for n, v in state.items() if not n.startswith("head.")}
    refused("a.pth", without_head, "pretrained encoder and classifies nothing. Fine-tune it")
    pretrained = {f"encoder.{n}": v for n, v in without_head.items()} | {"decoder.head.weight": 1}
    refused("a.pth", pretrained, "classifies nothing")
    first_token = {n.replace("fc_norm", "norm"): v for n, v in state.items()}
    refused("a.pth", first_token, "lacks 'norm.weight', 'norm.bias'.*first token")
    refused("a.pth", layouts[0].state_dict(), "weights of this project.*folder of the run")
    wide = {n: v for n, v in state.items() if not n.startswith("blocks.3.")}
    refused("a.pth", wide, "width 64, depth 3 and MLPs of 256")
    few = tmp_path / "few.txt"
    few.write_text("\n".join(names[1:]))
    labels = path.with_name("names.txt")
    for file, options, weights, words in (
        (
            tmp_path / "MCG-NJU/videomae-base",
            NO_OPTIONS,
            None,
            "there is no .*Nothing is downloaded",
        ),
        (path, NO_OPTIONS, None, "does not name its 8 classes: give --labels FILE"),
        (path, PublicOptions(few), None, "few.txt has 7 class names .* 8 classes"),
        (path, PublicOptions(labels), "best", "is not a run, and has one set of weights"),
        (path, PublicOptions(labels, ["data.strid=2"]), None, "did you mean 'data.stride'"),
        (path, PublicOptions(labels, ["pixels.std=[0,1,1]"]), None, "pixels|std"),
        (path, PublicOptions(labels, ["model.size=S"]), None, "model.size"),
    ):
        with pytest.raises(UserError, match=words):
            read_public(file, options, weights=weights)


@pytest.mark.slow
def test_a_vit_s_of_the_library_is_tested_and_predicts_as_there(
    real_videos: Path, tmp_path: Path
) -> None:
    """The commands on real clips of Kinetics, in the shape of the published models. Frames are not
    square, so the library's own resizing gives other pixels, by a few grey levels at edges."""
    names = [f"class {number}" for number in range(400)]
    folder, shards, out = tmp_path / "vit_s", tmp_path / "shards", tmp_path / "out"
    model = library_model(folder, "S", names, side=224)
    videos = sorted((real_videos / "clips" / "kinetics").glob("*.mp4"))[:2]
    for number, video in enumerate(videos):  # of the classes 399, 398, ...
        (tmp_path / "videos" / names[-1 - number]).mkdir(parents=True)
        shutil.copy(video, tmp_path / "videos" / names[-1 - number])
    made = ["--dataset=folder", "--video=copy", f"--videos={tmp_path}/videos"]
    done = run_script("data_tools/make_shards.py", *made, f"--output={shards}")
    assert done.returncode == 0, done.stderr
    options = ["--model", folder, "--views=1x1"]
    done = run_script("scripts/evaluate.py", *options, f"--shards={shards}", f"--output={out}")
    assert done.returncode == 0, done.stderr
    assert f"{len(videos)} of the model's 400 classes" in done.stdout
    (scores,) = (load_file(path) for path in out.rglob("*.safetensors"))
    assert sorted(scores["labels"].tolist()) == list(range(400 - len(videos), 400))
    done = run_script("scripts/predict.py", *videos, "--model", folder, "--top", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(videos) :]
    classifier = arvideo_ds.load_classifier(folder)
    for video, line in zip(videos, lines, strict=True):
        clip = classifier.clip(video)
        expected = library_logits(model, folder, clip.numpy())
        found = classifier(clip[None])[0].detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert line.split("   ")[1].startswith(f"{names[int(expected.argmax())]} ")
    tested = EvaluationClips(ShardSet(shards), classifier.recipe)
    for number, probabilities in enumerate(scores["probabilities"]):
        expected = library_logits(model, folder, tested[number].clips[0].numpy()).softmax(0)
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)
    frames, clip = decoded(videos[0], 16, 4), classifier.clip(videos[0])
    pixels = (255 * library_pixels(folder, frames) - clip).abs()
    logits = library_logits(model, folder, frames) - library_logits(model, folder, clip.numpy())
    print(
        f"with the library's resizing, pixels differ by {float(pixels.mean()):.2f} of 255, at most "
        f"{float(pixels.max()):.0f}, logits by at most {float(logits.abs().max()):.1e}"
    )
    assert pixels.mean() < 4
