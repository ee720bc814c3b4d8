"""The scoring pass and what pretraining gets of it: the scores of the delivered clip's own tokens.

Whatever the ranks, the workers and the kills on the way, the files are the same bytes.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arvideo_ds.cli.score_tokens import clip_shape
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import TrainClips, VideoClips
from arvideo_ds.data.loader import Batch, TrainLoader
from arvideo_ds.decoding import decoders
from arvideo_ds.errors import EXIT_INTERRUPTED, UserError
from arvideo_ds.long_video import scorers, scoring_pass
from arvideo_ds.long_video.estimators import Everest, Flow, TokenizerScorer
from arvideo_ds.long_video.score_store import SCORES, TokenScores, open_scores
from arvideo_ds.long_video.scorers import Piece, Scored, Scorer
from arvideo_ds.long_video.scoring_pass import ScoringJob, ScoringPass, score_shards
from arvideo_ds.models.cubes import to_cubes
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from tests import warm_start
from tests.conftest import ROOT, command_environment, run_script
from tests.textured_set import SHAPES, repeat_shards

PATCH, SIZE, STRIDE = (2, 8, 8), (32, 32), 2
MakeRecipe = Callable[..., PretrainRecipe]


@dataclass(frozen=True)
class MeanScorer:
    """A token's score is its mean colour, its code that colour as a whole number."""

    name: str = "mean"
    tokenizer: str | None = "f" * 64
    levels: tuple[int, ...] | None = (256,)
    on_device: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, piece: Piece) -> Scored:
        means = cube_means(torch.from_numpy(piece.frames))
        height, width = piece.frames.shape[2] // 8, piece.frames.shape[3] // 8
        scores = means.view(len(means), 8, height, width).numpy()
        return Scored(scores, scores.astype(np.int64))


def cube_means(clips: torch.Tensor) -> torch.Tensor:
    """Clips B F h w 3 -> B N."""
    return to_cubes(clips, PATCH).float().mean(-1)


def score(
    shards: Path,
    output: Path,
    scorer: Scorer,
    *,
    stop_after: int | None = None,
    spec: dict[str, Any] | None = None,
    **options: Any,
) -> ScoringPass:
    opened = ShardSet(shards)
    shape = {"stride": STRIDE, "size": SIZE, "patch": PATCH, **(spec or {})}
    asked = iter(range(10**9))
    return score_shards(
        ScoringJob(opened, scorer, output, "pyav", **shape, **options),
        stop=lambda: stop_after is not None and next(asked) >= stop_after,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if ".lock" not in path.name
    }


def recipe_of(tiny: MakeRecipe, shards: Path, scores: Path | None, **data: Any) -> PretrainRecipe:
    return tiny(
        model={"patch": list(PATCH)},
        data={
            "shards": str(shards),
            "scores": None if scores is None else str(scores),
            "crop": "grid",
            "stride": STRIDE,
            "decoder": "pyav",
            "num_streams": 3,
            **data,
        },
        train={"total_batch": 6, "micro_batch": 6, "max_steps": 4},
    )


def train_clips(shards: ShardSet, recipe: PretrainRecipe) -> TrainClips:
    return TrainClips(shards, recipe, scores=open_scores(shards, recipe))


def delivered(clips: TrainClips, positions: int) -> list[tuple[str, VideoClips]]:
    return [(clips.sample(n)[1].key, clips[n]) for n in range(positions)]


@pytest.fixture(scope="module")
def means(textured_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the mean colour, with codes."""
    folder = tmp_path_factory.mktemp("means") / "scores"
    score(textured_shards, folder, MeanScorer())
    return folder


@pytest.fixture
def other_shards(textured_shards: Path, tmp_path: Path) -> Path:
    """The same videos under another manifest."""
    repeat_shards(textured_shards, tmp_path / "other", 1)
    return tmp_path / "other"


@pytest.fixture
def damaged(textured_shards: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the shards in which one video's bytes were overwritten, and its key."""
    folder = shutil.copytree(textured_shards, tmp_path / "damaged")
    shards = ShardSet(folder)
    sample = shards.index(1).samples[2]
    with (folder / shards.manifest.shards[1].name).open("r+b") as tar:
        tar.seek(sample.offset)
        tar.write(b"\xa5" * sample.bytes)
    return folder, sample.key


def test_grids_are_those_of_the_whole_video(textured_shards: Path, means: Path) -> None:
    store, shards = TokenScores(means), ShardSet(textured_shards)
    assert store.contents.num_videos == len(SHAPES)
    assert store.contents.unreadable == {}
    for shard in range(3):
        for sample in shards.index(shard).samples:
            video = store.read(shard, sample.key)
            assert video is not None
            number = int(Path(sample.key).name.split("_")[0][1:])
            height, width, frames = SHAPES[number]
            sampled = -(-frames // STRIDE)
            scale = 32 / min(height, width)
            expected = (-(-sampled // 2), int(scale * height) // 8, int(scale * width) // 8)
            assert video.scores.shape == expected, sample.key


def test_scores_and_codes_are_those_of_the_delivered_clips_tokens(
    textured_shards: Path, means: Path, tiny: MakeRecipe
) -> None:
    recipe = recipe_of(tiny, textured_shards, means, repeats=3)
    clips = train_clips(ShardSet(textured_shards), recipe)
    differing = set()
    for key, video in delivered(clips, 45):
        assert video.skipped is None
        assert video.scores is not None
        for clip, stored in zip(video.clips, video.scores, strict=True):
            expected = cube_means(clip[None])[0].numpy()
            scores, codes = stored.flat()
            # Where a short video repeats its last frame, nothing is worth more than its least.
            frames = int(key.rpartition("_")[2].removesuffix(".mp4"))
            there = -(-frames // (STRIDE * PATCH[0])) * stored.scores[0].size
            kept = expected.astype(np.float16).astype(np.float32)
            assert np.array_equal(scores[:there], kept[:there]), key
            assert (scores[there:] <= kept.min()).all(), key
            assert codes is not None
            assert np.array_equal(codes, expected.astype(np.int64)), key
            differing.add(scores.tobytes())
    assert len(differing) > 30  # crops and starts are many


def test_distances_in_time_are_those_of_the_delivered_clips_tokens(
    textured_shards: Path, tiny: MakeRecipe, tmp_path: Path
) -> None:
    """Only the first time of a stored window may differ: it has the next one's distance."""
    score(textured_shards, tmp_path / "everest", Everest(PATCH))
    recipe = recipe_of(tiny, textured_shards, tmp_path / "everest", frames=32)
    clips = train_clips(ShardSet(textured_shards), recipe)
    starts = []
    for key, video in delivered(clips, 45):
        if int(key.rpartition("_")[2].removesuffix(".mp4")) < 32 * STRIDE:
            continue
        assert video.scores is not None
        piece = Piece("", 0, video.clips[0].numpy()[None])
        expected = Everest(PATCH)(piece).scores[0].astype(np.float16)
        found = video.scores[0].flat()[0].reshape(expected.shape)
        same = [np.allclose(f, e, rtol=2e-3) for f, e in zip(found, expected, strict=True)]
        others = [time for time in range(1, 16) if not same[time]]
        assert len({time % 8 for time in others}) <= 1, (key, others)
        assert all(np.allclose(found[t], expected[t + 1], rtol=2e-3) for t in others if t < 15)
        starts.append(tuple(others))
    assert len(starts) > 10
    assert len(set(starts)) > 3


def test_batches_carry_scores_whatever_the_workers(
    textured_shards: Path, means: Path, tiny: MakeRecipe
) -> None:
    recipe = recipe_of(tiny, textured_shards, means)
    loaded = [load(textured_shards, recipe, workers=workers) for workers in (0, 2)]
    for one, other in zip(*loaded, strict=True):
        for batch in (one, other):
            assert batch.scores is not None
            assert batch.codes is not None
            assert batch.scores.shape == batch.codes.shape == (6, 4 * 4 * 4)
            assert (batch.scores.dtype, batch.codes.dtype) == (torch.float32, torch.int64)
            wanted = cube_means(batch.clips)
            moved = batch.to(torch.device("cpu"))
            assert torch.equal(moved.codes, wanted.long())  # type: ignore[arg-type]
            # Whole but for the times after a short video's end.
            same = moved.scores == wanted.half().float()
            assert same.all(dim=1).float().mean() > 0.5
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.scores, other.scores)  # type: ignore[arg-type]


def test_clips_on_the_grid_need_no_scores(textured_shards: Path, tiny: MakeRecipe) -> None:
    for batch in load(textured_shards, recipe_of(tiny, textured_shards, None), workers=0):
        assert batch.clips.shape == (6, 8, 32, 32, 3)
        assert batch.valid.all()
        assert batch.scores is batch.codes is None


def load(shards: Path, recipe: PretrainRecipe, *, workers: int) -> list[Batch]:
    opened = ShardSet(shards)
    plan = make_plan(recipe, world_size=1, num_videos=opened.num_samples)
    return list(
        TrainLoader(
            opened,
            recipe,
            plan,
            rank=0,
            first_step=0,
            num_workers=workers,
            pin_memory=False,
            clips=partial(TrainClips, scores=open_scores(opened, recipe)),
        )
    )


@pytest.mark.parametrize("scorer", [MeanScorer(), MeanScorer(on_device=True)])
def test_ranks_interruptions_and_leftovers_change_no_byte(
    textured_shards: Path, means: Path, tmp_path: Path, scorer: Scorer
) -> None:
    folder = tmp_path / "scores"
    ranks = [{"rank": rank, "num_ranks": 2} for rank in range(2)]
    assert score(textured_shards, folder, scorer, stop_after=2, **ranks[0]).interrupted
    assert set(contents(folder)) == {"shard-000000.safetensors"}
    (folder / "shard-000000.safetensors.partial").write_bytes(b"half")
    assert not score(textured_shards, folder, scorer, **ranks[1]).interrupted
    left = {"shard-000000.safetensors.partial", "shard-000001.safetensors"}
    assert set(contents(folder)) == {*left, "shard-000000.safetensors"}
    report = score(textured_shards, folder, scorer, **ranks[0])
    assert (report.new_videos, report.new_files) == (4, 2)
    assert contents(folder) == contents(means)
    again = score(textured_shards, folder, scorer)
    assert (again.new_videos, again.new_files) == (0, 0)
    assert contents(folder) == contents(means)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_rank_that_ends_last_writes_what_all_have(
    textured_shards: Path, means: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    reports = [
        score(textured_shards, tmp_path / "s", MeanScorer(), rank=rank, num_ranks=3)
        for rank in order
    ]
    assert [report.contents is not None for report in reports] == [False, False, True]
    assert not any(report.interrupted or report.lacking for report in reports)
    assert contents(tmp_path / "s") == contents(means)


@dataclass(frozen=True)
class FailsOn(MeanScorer):
    """Runs out of memory (or hangs, or dies) on a video, as often as lines of a file say."""

    video: str = ""
    file: Path = Path()
    how: str = "error"

    def __call__(self, piece: Piece) -> Scored:
        if piece.key == self.video and (left := int(self.file.read_text())):
            self.file.write_text(str(left - 1))
            if self.how == "die":
                os._exit(9)
            if self.how == "hang":
                time.sleep(1000)
            raise MemoryError("no memory left for it")
        return super().__call__(piece)


@pytest.fixture
def failing(textured_shards: Path, tmp_path: Path) -> Callable[..., FailsOn]:
    def make(times: int, how: str = "error") -> FailsOn:
        (tmp_path / "times").write_text(str(times))
        video = ShardSet(textured_shards).index(1).samples[2].key
        return FailsOn(video=video, file=tmp_path / "times", how=how)

    return make


def test_what_fails_once_is_tried_again(
    textured_shards: Path, means: Path, tmp_path: Path, failing: Callable[..., FailsOn]
) -> None:
    report = score(textured_shards, tmp_path / "s", failing(1))
    assert report.failed == {}
    assert contents(tmp_path / "s") == contents(means)


def test_what_fails_twice_waits_for_the_next_pass_and_costs_no_other(
    textured_shards: Path, means: Path, tmp_path: Path, failing: Callable[..., FailsOn]
) -> None:
    scorer, folder = failing(2), tmp_path / "s"
    ranks = [{"rank": rank, "num_ranks": 2} for rank in range(2)]
    first = score(textured_shards, folder, scorer, **ranks[1])
    assert first.failed == {scorer.video: "error (MemoryError: no memory left for it)"}
    assert (first.new_videos, first.lacking, first.interrupted) == (2, [], False)
    last = score(textured_shards, folder, scorer, **ranks[0])
    assert (last.failed, last.lacking, last.contents) == ({}, [scorer.video], None)
    # It has nothing to do, and must not end the others by an exit code.
    assert score(textured_shards, folder, scorer, **ranks[0]).lacking == []
    again = score(textured_shards, folder, scorer, **ranks[1])
    assert (again.new_videos, again.new_files, again.failed) == (1, 1, {})
    assert contents(folder) == contents(means)


def test_what_always_fails_can_be_left_out(
    textured_shards: Path, tmp_path: Path, failing: Callable[..., FailsOn]
) -> None:
    scorer = failing(99)
    report = score(textured_shards, tmp_path / "s", scorer, leave_out_failed=True)
    assert report.contents is not None
    assert report.contents.unreadable == {
        scorer.video: "error (MemoryError: no memory left for it)"
    }


def test_a_full_disk_ends_in_a_sentence(
    textured_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scoring_pass, "write_bytes", write)
    with pytest.raises(UserError, match=r"is full .*the same command goes on"):
        score(textured_shards, tmp_path / "s", MeanScorer())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("hang", "timeout"), ("die", "crash")])
def test_a_process_that_hangs_or_dies_says_nothing_of_its_video(
    textured_shards: Path,
    means: Path,
    tmp_path: Path,
    failing: Callable[..., FailsOn],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    said: str,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    scorer, folder = failing(3, how), tmp_path / "s"
    report = score(textured_shards, folder, scorer, workers=1, timeout_s=5)
    assert [why.partition(" ")[0] for why in report.failed.values()] == [said]
    assert report.lacking == [scorer.video]
    assert score(textured_shards, folder, scorer, workers=1, timeout_s=5).failed == {}
    assert contents(folder) == contents(means)


@pytest.mark.parametrize("scorer", [MeanScorer(), Flow(PATCH)])
def test_memory_bounds_what_is_decoded_at_once_and_changes_no_byte(
    textured_shards: Path, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def decode(*arguments: Any) -> np.ndarray:
        frames = decoders.decode(*arguments)
        sizes.append(frames.nbytes)
        return frames

    monkeypatch.setattr(scoring_pass, "decode", decode)
    largest = {}
    for bound in (0, 600_000, 2**40):
        monkeypatch.setattr(scoring_pass, "_DECODED_BYTES", bound)
        sizes.clear()
        score(textured_shards, tmp_path / str(bound), scorer)
        largest[bound] = max(sizes)
    window = 16 * 3 * 96 * 64
    assert largest[0] == window
    assert window < largest[600_000] <= 600_000
    assert largest[2**40] > 600_000
    assert len({tuple(contents(tmp_path / str(bound)).values()) for bound in largest}) == 1


def test_a_file_that_was_altered_is_made_anew_and_training_names_it(
    textured_shards: Path, means: Path, tiny: MakeRecipe, tmp_path: Path
) -> None:
    folder = shutil.copytree(means, tmp_path / "altered")
    path = folder / "shard-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    shards = ShardSet(textured_shards)
    clips = train_clips(shards, recipe_of(tiny, textured_shards, folder))
    skipped = [video.skipped for _, video in delivered(clips, 9) if video.skipped is not None]
    assert [one.kind for one in skipped] == ["altered"]
    assert "altered/shard-000002.safetensors" in skipped[0].message
    assert score(textured_shards, folder, MeanScorer()).new_files == 1
    assert contents(folder) == contents(means)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"shard-000002.safetensors has \d+ bytes"):
        TokenScores(folder).check_sizes()


def test_a_video_that_was_altered_waits_until_its_shard_is_whole_again(
    damaged: tuple[Path, str], textured_shards: Path, means: Path, tmp_path: Path
) -> None:
    folder, key = damaged
    report = score(folder, tmp_path / "scores", MeanScorer())
    assert report.lacking == list(report.failed) == [key]
    assert "copy the shard again" in report.failed[key]
    shutil.copytree(textured_shards, folder, dirs_exist_ok=True)
    assert score(folder, tmp_path / "scores", MeanScorer()).new_videos == 1
    assert contents(tmp_path / "scores") == contents(means)


@pytest.mark.parametrize("kind", ["RuntimeError", "_ArrayMemoryError"])
def test_a_video_that_does_not_decode_is_settled_unless_memory_was_short(
    textured_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls = []

    def decode(name: str, video: bytes, frames: np.ndarray) -> np.ndarray:
        if len(frames) == 16 and frames[-1] == 0:  # the video of one frame
            calls.append(frames)
            raise decoders.DecodeError(kind, "no")
        return decoders.decode(name, video, frames)

    monkeypatch.setattr(scoring_pass, "decode", decode)
    report = score(textured_shards, tmp_path / "scores", MeanScorer())
    if kind == "RuntimeError":
        assert (len(calls), report.failed) == (1, {})
        assert report.contents is not None
        assert list(report.contents.unreadable.values()) == ["RuntimeError (no)"]
    else:
        assert len(calls) == 2
        assert list(report.failed.values()) == ["error (MemoryError: no)"]


def test_a_list_of_scores_that_cannot_be_read_says_what_to_do(
    textured_shards: Path, means: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(means, tmp_path / "s")
    (folder / SCORES).write_text((folder / SCORES).read_text()[:100])
    with pytest.raises(UserError, match=r"scores\.json cannot be read .*Delete it"):
        score(textured_shards, folder, MeanScorer())
    (folder / SCORES).unlink()
    assert score(textured_shards, folder, MeanScorer()).new_videos == 0
    assert contents(folder) == contents(means)


def test_unreadable_videos_are_named_have_no_entry_and_are_not_valid(
    damaged: tuple[Path, str], textured_shards: Path, tiny: MakeRecipe, tmp_path: Path
) -> None:
    folder, key = damaged
    report = score(folder, tmp_path / "scores", MeanScorer(), leave_out_failed=True)
    assert report.contents is not None
    assert report.contents.num_videos == len(SHAPES) - 1
    assert list(report.contents.unreadable) == [key]
    assert "AlteredError" in report.contents.unreadable[key]
    assert TokenScores(tmp_path / "scores").read(1, key) is None
    # The video is whole again: still there is nothing to say of its tokens.
    shutil.copytree(textured_shards, folder, dirs_exist_ok=True)
    clips = train_clips(ShardSet(folder), recipe_of(tiny, folder, tmp_path / "scores"))
    for name, video in delivered(clips, 9):
        if name != key:
            assert video.skipped is None
            continue
        assert video.skipped is not None
        assert video.skipped.kind == "unscored"
        assert video.scores is not None
        scores, codes = video.scores[0].flat()
        assert scores.shape == (64,)
        assert codes is not None
        assert not scores.any()
        assert not codes.any()
        assert not video.clips[0].any()


def test_scores_that_are_no_numbers_are_not_stored(textured_shards: Path, tmp_path: Path) -> None:
    class Infinite(MeanScorer):
        def __call__(self, piece: Piece) -> Scored:
            scored = super().__call__(piece)
            return Scored(scored.scores + 1e5 * (piece.frames.shape[2] > 32), scored.codes)

    report = score(textured_shards, tmp_path / "scores", Infinite())
    assert report.contents is not None
    assert 0 < len(report.contents.unreadable) < len(SHAPES)
    assert all("not_finite" in why for why in report.contents.unreadable.values())


def test_other_shards_scorers_tokens_and_tokenizers_are_refused(
    textured_shards: Path, other_shards: Path, means: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(means, tmp_path / "scores")
    before = contents(folder)
    for begun in (True, False):
        if not begun:
            (folder / SCORES).unlink()
        with pytest.raises(UserError, match=r"tokenizer was ffffffffffff, is 000000000000"):
            score(textured_shards, folder, MeanScorer(tokenizer="0" * 64))
        with pytest.raises(UserError, match=r'scorer was "mean", is "everest"'):
            score(textured_shards, folder, Everest(PATCH))
        with pytest.raises(UserError, match=r"stride was 2, is 3"):
            score(textured_shards, folder, MeanScorer(), spec={"stride": 3})
    with pytest.raises(UserError, match=r"the shards' manifest was \w{12}, is \w{12}"):
        score(other_shards, folder, MeanScorer())
    assert contents(folder) == {name: data for name, data in before.items() if name != SCORES}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stride": 1}, "data.stride is 2 there and 1 in the recipe"),
        ({"size": [32, 64]}, r"data.size is \[32, 32\] there and \[32, 64\] in the recipe"),
    ],
)
def test_recipes_of_other_tokens_are_refused_with_both_values(
    textured_shards: Path, means: Path, tiny: MakeRecipe, changed: dict[str, Any], said: str
) -> None:
    recipe = recipe_of(tiny, textured_shards, means, **changed)
    with pytest.raises(UserError, match=said):
        train_clips(ShardSet(textured_shards), recipe)


def test_clips_of_scored_tokens_are_not_made_without_the_scores(
    textured_shards: Path, means: Path, tiny: MakeRecipe
) -> None:
    with pytest.raises(ValueError, match=r"data\.scores=.* must come with its reader"):
        TrainClips(ShardSet(textured_shards), recipe_of(tiny, textured_shards, means))


def test_scores_of_other_shards_and_unfinished_ones_are_refused(
    other_shards: Path, means: Path, tiny: MakeRecipe, tmp_path: Path
) -> None:
    shards = ShardSet(other_shards)
    with pytest.raises(UserError, match=r"scores of other shards than .*other: manifest \w{12}"):
        train_clips(shards, recipe_of(tiny, other_shards, means))
    with pytest.raises(UserError, match=r"no finished token scores in .*arvideo score_tokens"):
        train_clips(shards, recipe_of(tiny, other_shards, tmp_path))


def test_scores_of_a_recipe_without_a_stride_are_refused(tiny: MakeRecipe) -> None:
    options = argparse.Namespace(stride=None, size=None, patch=None, overrides=[])
    with pytest.raises(UserError, match=r"data\.fps=5, but .* Give the recipe data\.stride"):
        clip_shape(options, tiny(data={"stride": None, "fps": 5}))


def test_a_recipe_that_moves_tokens_is_refused(tiny: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r'Set data\.crop="grid", data\.flip=false,'):
        tiny(data={"scores": "S", "flip": True})
    with pytest.raises(UserError, match=r"data\.erase=0\.25 changes them"):
        tiny(data={"scores": "S", "crop": "grid", "erase": 0.25})


class StandIn(torch.nn.Module):
    """A tokenizer as the scorer needs it."""

    class settings:  # noqa: N801  named as the attribute of the real one
        levels = (8, 8)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.patch = PATCH
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def tokens(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = self.weight * cube_means(windows)
        scores = means.view(len(windows), 8, windows.shape[2] // 8, windows.shape[3] // 8)
        return scores, (scores.long() % 64)


def test_a_tokenizer_gives_scores_and_codes_and_is_known_by_its_weights(
    textured_shards: Path, means: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = {"run": StandIn(), "copy": StandIn(), "other": StandIn(0.5)}
    load = "arvideo_ds.long_video.tokenizer.load_tokenizer"
    monkeypatch.setattr(load, lambda path: networks[str(path)])
    scorer = scorers.make_scorer("tokenizer", PATCH, tokenizer="run", device="cpu")
    report = score(textured_shards, tmp_path / "scores", scorer)
    assert report.contents is not None
    assert report.contents.spec.levels == (8, 8)
    store, expected = TokenScores(tmp_path / "scores"), TokenScores(means)
    for shard in range(3):
        for sample in ShardSet(textured_shards).index(shard).samples:
            found, wanted = store.read(shard, sample.key), expected.read(shard, sample.key)
            assert found is not None
            assert wanted is not None
            assert np.array_equal(found.scores, wanted.scores)
            assert found.codes is not None
            assert wanted.codes is not None
            assert np.array_equal(found.codes, wanted.codes % 64)
    assert TokenizerScorer(PATCH, "copy", "cpu").tokenizer == scorer.tokenizer
    with pytest.raises(UserError, match=r"the tokenizer was \w{12}, is \w{12}"):
        score(textured_shards, tmp_path / "scores", TokenizerScorer(PATCH, "other", "cpu"))
    with pytest.raises(UserError, match=r"Score with its own"):
        _ = TokenizerScorer((2, 16, 16), "run", "cpu").tokenizer


def command(shards: Path, output: Path, *more: str) -> list[str]:
    shape = ["--stride", "2", "--size", "32", "--patch", "2", "8", "8", "--decoder", "pyav"]
    script = [str(ROOT / "scripts" / "score_tokens.py"), "--scorer", "flow"]
    return [*script, "--shards", str(shards), "--output", str(output), *shape, *more]


def start_ranks(command: list[str]) -> list[warm_start.Process]:
    """Two processes that know their rank and need not meet."""
    places = [{"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank} for rank in "01"]
    return [
        warm_start.start(command, cwd=ROOT, env=command_environment(**place)) for place in places
    ]


@pytest.mark.slow
def test_the_command_on_two_ranks_and_on_one_writes_the_same_bytes(
    textured_shards: Path, tmp_path: Path
) -> None:
    alone = run_script(*command(textured_shards, tmp_path / "one", "--workers", "0"))
    assert alone.returncode == 0, alone.stderr
    assert "9 videos in 3 files" in alone.stdout
    ranks = start_ranks(command(textured_shards, tmp_path / "two", "--workers", "1"))
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    listed = json.loads((tmp_path / "one" / SCORES).read_text())
    assert listed["spec"]["scorer"] == "flow"
    refused = run_script(*command(textured_shards, tmp_path / "one", "--patch", "2", "16", "16"))
    assert refused.returncode == 2
    assert "patch was [2, 8, 8], is [2, 16, 16]" in refused.stderr
    assert "Traceback" not in refused.stderr


def wait_for_a_file(ranks: list[warm_start.Process], folder: Path) -> None:
    """Until there is a file more than there was, or nobody left to write one."""

    def written() -> set[str]:
        return {path.name for path in folder.glob("shard-*.safetensors")}

    before = written()
    while written() == before and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)


@pytest.mark.slow
def test_a_pass_killed_at_random_moments_ends_in_the_same_files(
    textured_shards: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    repeat_shards(textured_shards, many, 4)
    started = time.monotonic()
    whole = run_script(*command(many, tmp_path / "whole", "--workers", "1"))
    assert whole.returncode == 0, whole.stderr
    lasts = time.monotonic() - started
    kills, generator = 0, random.Random(0)
    for attempt in range(40):
        ranks = start_ranks(command(many, tmp_path / "killed", "--workers", "1"))
        if attempt % 2 == 0:
            wait_for_a_file(ranks, tmp_path / "killed")
        time.sleep(generator.uniform(0, 0.2 if attempt % 2 == 0 else lasts))
        sent = signal.SIGTERM if attempt % 3 == 2 else signal.SIGKILL
        # One alone, now and then both.
        for rank in ranks if attempt % 4 == 3 else [generator.choice(ranks)]:
            rank.send_signal(sent)
        codes = [rank.wait(300) for rank in ranks]
        if codes == [0, 0]:
            break
        assert set(codes) <= {0, -signal.SIGKILL, EXIT_INTERRUPTED, -signal.SIGTERM, 3}
        kills += 1
    # How many depends on how evenly the machine runs; the first comes after one file of twelve.
    assert kills
    last = run_script(*command(many, tmp_path / "killed", "--workers", "1"))
    assert last.returncode == 0, last.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
