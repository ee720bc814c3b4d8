"""A data set from a file outside of the package: read by the command, its rules obeyed."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.data.clips import TrainClips, require_protocol
from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.reshard import merged, open_pool, write_part
from tests.conftest import ROOT, command_environment

PLUGIN = """
from pathlib import Path

from arvideo_ds.shards.datasets import READERS, Entry, Listing, Option, Reader, Source, VideoTree

SUFFIX = Option("suffix", "what a video's name ends with", str, "")


def read(source: Source) -> Listing:
    tree = VideoTree(source.videos)
    entries = []
    for stem in tree.stems():
        if stem.endswith(source.get(SUFFIX)):
            entries.append(tree.entry(tree.find(stem), stem.partition("-")[0]))
    labels = tuple(sorted({entry.label_name for entry in entries}))
    return Listing(tuple(entries), labels, passed_over=tree.passed_over)


READERS.register("my_set")(Reader(read, (SUFFIX,), flip=False, sampling="uniform"))
"""


def write_video(path: Path, level: int) -> None:
    frames = (av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8)) for _ in range(8))
    pictures = (frame.reformat(format="yuv420p") for frame in frames)
    path.write_bytes(encode(pictures, rate=Fraction(8), settings=TranscodeSettings()))


def make_shards(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "data_tools/make_shards.py", "--plugin", folder / "plugin.py"),
        *("--dataset", "my_set", "--videos", folder / "videos", "--output", folder / "shards"),
        *("--short_side", "0", "--workers", "1", *options),
    ]
    environment = command_environment()
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my_set")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "videos").mkdir()
    for number, name in enumerate(("left-1a", "right-1a", "left-2b")):
        write_video(folder / "videos" / f"{name}.mp4", 40 * number)
    done = make_shards(folder, "--suffix", "a")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_command_reads_it_with_its_options(made: Path) -> None:
    manifest = ShardSet(made / "shards").manifest
    assert (manifest.dataset, manifest.labels) == ("my_set", ("left", "right"))
    assert manifest.num_samples == 2


def test_the_help_lists_it_with_its_options_and_rules(made: Path) -> None:
    shown = " ".join(make_shards(made, "--help").stdout.split())
    assert "my_set --suffix; flips refused; uniform sampling" in shown
    assert "ssv2 --labels; flips refused; uniform sampling" in shown


def test_an_option_of_another_data_set_is_refused_with_those_that_read_it(made: Path) -> None:
    done = make_shards(made, "--nouns", "nouns.csv")
    assert done.returncode == 2
    assert "--dataset my_set does not read --nouns" in done.stderr
    assert "epic_kitchens" in done.stderr


def test_its_rules_are_obeyed_also_where_the_plugin_is_not_loaded(
    made: Path, tmp_path: Path
) -> None:
    """Labels that tell left from right must not depend on an environment variable."""
    finetuning = load_recipe("finetune_demo", ["data.sampling=dense"], FinetuneRecipe)
    pool = open_pool([made / "shards"], seed=0)
    write_part(pool, merged(pool, tmp_path / "merged"), how="merged", samples_per_shard=1)
    for folder in (made / "shards", tmp_path / "merged"):
        shards = ShardSet(folder)
        with pytest.raises(UserError, match=r"data.flip=true, but .* is my_set.*left from right"):
            TrainClips(shards, load_recipe("demo", ["data.flip=true"]))
        with pytest.raises(UserError, match=r"data.sampling=dense.*my_set.*uniform"):
            require_protocol(shards, finetuning)
