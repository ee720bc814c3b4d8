"""Samples of several labels: from the annotations to batches, and shards of one label as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.clips import EvaluationClips, TrainClips
from arvideo_ds.data.loader import collate
from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import ShardSet, require_same_labels
from arvideo_ds.shards.members import read_facts
from arvideo_ds.shards.reshard import merged, notes, open_pool, split, with_labels, write_part
from arvideo_ds.shards.store import Store
from arvideo_ds.shards.verify import check_shard
from tests.epic_set import NOUNS, VERBS

Make = Callable[..., FinetuneRecipe]
HEADS = {"finetune": {"heads": ["verb", "noun"]}}


def labels_by_key(folder: Path) -> dict[str, dict[str, str]]:
    """The names of each sample's labels, as the index numbers them."""
    shards = ShardSet(folder)
    sets = shards.manifest.label_sets
    assert sets is not None
    return {
        sample.key: {name: sets[name][n] for name, n in (sample.labels_by_set or {}).items()}
        for number in range(len(shards.manifest.shards))
        for sample in shards.index(number).samples
    }


def expected(films: int) -> dict[str, dict[str, str]]:
    return {
        f"train_{n // 2:02d}_{n % 2}": {"verb": VERBS[n % 3], "noun": NOUNS[n % 4]}
        for n in range(2 * films)
    }


def problems(folder: Path) -> list[str]:
    known = ShardSet(folder).manifest
    found = [check_shard(Store(folder), entry, known.names_by_set) for entry in known.shards]
    return [problem.message for shard in found for problem in shard]


def test_shards_carry_both_labels_of_every_action(epic_shards: Path) -> None:
    shards = ShardSet(epic_shards / "train")
    assert shards.manifest.label_sets == {"verb": VERBS, "noun": NOUNS}
    # What knows one label goes by the verb.
    assert shards.manifest.labels == VERBS
    assert labels_by_key(epic_shards / "train") == expected(12)
    sample = shards.index(0).samples[0]
    (facts, *_) = read_facts(shards.path(0), [sample])
    assert facts.labels_by_set == sample.labels_by_set
    assert facts.names_by_set == expected(12)[sample.key]
    assert facts.label_name == facts.names_by_set["verb"]


def test_shards_of_one_label_say_nothing_of_sets(demo_shards: Path) -> None:
    """So their bytes, and the hashes that checkpoints name, are those of earlier versions."""
    texts = [path.read_text() for path in (demo_shards / "train").glob("*.json")]
    assert len(texts) > 1
    assert not [text for text in texts if "label_sets" in text or "by_set" in text]


def test_batches_have_a_label_for_each_head_that_the_recipe_names(
    epic_shards: Path, tiny_finetune: Make
) -> None:
    shards, known = ShardSet(epic_shards / "train"), labels_by_key(epic_shards / "train")
    for heads in (["verb", "noun"], ["noun", "verb"], ["noun"]):
        recipe = tiny_finetune(finetune={"heads": heads})
        clips = EvaluationClips(shards, recipe, views=(1, 2))
        batch = collate([clips[number] for number in range(3)])
        samples = [shards.index(0).samples[number] for number in range(3)]
        numbers = {"verb": VERBS.index, "noun": NOUNS.index}
        rows = [[numbers[name](known[s.key][name]) for name in heads] for s in samples]
        assert torch.equal(batch.labels, torch.tensor(rows).repeat_interleave(2, dim=0))
    train = TrainClips(shards, tiny_finetune(**HEADS))
    video, key = train[5], train.sample(5)[1].key
    assert video.label == (VERBS.index(known[key]["verb"]), NOUNS.index(known[key]["noun"]))
    one = collate([EvaluationClips(shards, tiny_finetune())[number] for number in range(3)])
    assert one.labels.shape == (3,)


def test_a_sample_without_labels_has_none_for_any_head(
    demo_shards: Path, tiny_finetune: Make
) -> None:
    clips = EvaluationClips(ShardSet(demo_shards / "test"), tiny_finetune(**HEADS))
    assert clips[0].label == (-1, -1)


def test_a_set_that_the_shards_lack_is_said_with_those_they_have(
    epic_shards: Path, demo_shards: Path
) -> None:
    manifest = ShardSet(epic_shards / "train").manifest
    assert manifest.class_names(["noun"]) == {"noun": NOUNS}
    with pytest.raises(UserError, match=r"'nuon'.*have verb, noun"):
        manifest.class_names(["verb", "nuon"])
    with pytest.raises(UserError, match="have one label each"):
        ShardSet(demo_shards / "train").manifest.class_names(["verb"])


def test_sets_of_other_classes_are_told_apart_by_name(epic_shards: Path) -> None:
    names = ShardSet(epic_shards / "train").manifest.class_names(["verb", "noun"])
    require_same_labels("a", names, "b", {"verb": list(VERBS), "noun": list(NOUNS)})
    with pytest.raises(UserError, match=r"a \(noun\) and b \(noun\).*'tap' only in a"):
        require_same_labels("a", names, "b", {"verb": VERBS, "noun": NOUNS[:3]})
    with pytest.raises(UserError, match="different labels"):
        require_same_labels("a", names, "b", VERBS)


def test_resharding_keeps_both_labels(epic_shards: Path, tmp_path: Path) -> None:
    pool = open_pool([epic_shards / "train", epic_shards / "test"], seed=0)
    both = tmp_path / "both"
    write_part(pool, merged(pool, both), how="all", samples_per_shard=10)
    known = labels_by_key(both)
    assert len(known) == 32
    assert known.items() >= expected(12).items()
    assert not problems(both)
    for part in split(pool, Fraction(1, 2), tmp_path / "parts", ("a", "b")):
        write_part(pool, part, how="half", samples_per_shard=10)
        assert labels_by_key(part.folder).items() <= known.items()
    # One verb alone is numbered anew; the sets, and so the heads, stay as they were.
    write_part(pool, with_labels(pool, ["put"], tmp_path / "put"), how="put", samples_per_shard=99)
    put = ShardSet(tmp_path / "put").manifest
    assert (put.labels, put.label_sets) == (("put",), {"verb": VERBS, "noun": NOUNS})
    assert {names["verb"] for names in labels_by_key(tmp_path / "put").values()} == {"put"}


def relabelled(shards: Path, folder: Path, labels: list[str] | None) -> ShardSet:
    """A manifest as versions before label sets wrote it."""
    tree = json.loads((shards / "manifest.json").read_text())
    del tree["label_sets"]
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**tree, "labels": labels}))
    return ShardSet(folder)


def test_what_a_merge_does_to_labels_is_told_before(epic_shards: Path, tmp_path: Path) -> None:
    train, test = (ShardSet(epic_shards / split) for split in ("train", "test"))
    assert list(notes([train, test])) == []
    old = relabelled(epic_shards / "test", tmp_path / "old", list(VERBS))
    assert list(notes([train, old])) == [
        f"{old.name} has no label set '{name}': its 8 samples stay without, and fine-tuning takes "
        "no loss on them"
        for name in ("verb", "noun")
    ]
    numbered = relabelled(epic_shards / "test", tmp_path / "numbered", ["0", "1"])
    told = next(notes([train, numbered]))
    assert told == f"labels: 5 names together, 3 in {train.name}, 2 in {numbered.name}"


def test_heads_for_shards_without_any_label_are_refused(epic_shards: Path, tmp_path: Path) -> None:
    bare = relabelled(epic_shards / "test", tmp_path / "bare", None)
    with pytest.raises(UserError, match=r"'verb', but the shards of epic_kitchens have none\."):
        bare.manifest.class_names(["verb", "noun"])


def test_a_label_of_a_set_that_is_not_its_name_is_found(epic_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(epic_shards / "test", tmp_path / "shards")
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    tree["label_sets"]["noun"] = ["lid", "cup", "pan", "tap"]
    path.write_text(json.dumps(tree))
    messages = problems(folder)
    assert len(messages) == 4
    assert "has label 'cup', but number 0 is 'lid'" in messages
