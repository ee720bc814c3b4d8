"""Manifests, indices and run.json that people or disks spoiled: a sentence for the user, always."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arvideo_ds.errors import UserError
from arvideo_ds.exports.source import read_json
from arvideo_ds.shards.manifest import MANIFEST, ShardSet

# What stands where something else is expected.
VALUES = [None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, float("nan"), [], {}, [[]], [None]]
TEXTS = ["", "x", "../a.tar", "a\0.tar", "é.tar", "9" * 70, "a" * 300 + ".tar"]
STRANGE = st.sampled_from([*VALUES, *TEXTS, {"name": "a.tar"}])
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def sound(textured_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(textured_shards, tmp_path_factory.mktemp("malformed") / "shards")


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below a JSON value."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*above, key)
            yield from places(value, (*above, key))


def changed(text: bytes, draw: Callable[..., Any]) -> bytes:
    """JSON with one value exchanged, removed or given twice, or bytes spoiled."""
    how = draw(st.sampled_from(["value", "value", "remove", "twice", "cut", "byte"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if how == "byte":
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + bytes([draw(st.integers(0, 255))]) + text[place + 1 :]
    tree = json.loads(text)
    *above, last = draw(st.sampled_from(list(places(tree))))
    holder = tree
    for key in above:
        holder = holder[key]
    if how == "value":
        holder[last] = draw(STRANGE)
    elif how == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[f"{last}2"] = holder[last]
    indent = draw(st.sampled_from([None, 1]))  # 1 is how manifests are written
    return (json.dumps(tree, indent=indent) + "\n").encode()


def use(folder: Path) -> None:
    """All that a run does with them at its start; only `UserError` may come out."""
    try:
        shards = ShardSet(folder)
        shards.check(limit_s=60)
        for number in range(len(shards.manifest.shards)):
            for sample in shards.index(number).samples:
                shards.read_bytes(number, sample.offset, sample.bytes)
    except UserError:
        pass


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_manifest_opens_or_is_a_users_mistake(sound: Path, data: st.DataObject) -> None:
    path = sound / MANIFEST
    text = path.read_bytes()
    try:
        path.write_bytes(changed(text, data.draw))
        use(sound)
    finally:
        path.write_bytes(text)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_index_whose_hash_the_manifest_has_opens_or_is_a_users_mistake(
    sound: Path, data: st.DataObject
) -> None:
    path, manifest = next(iter(sorted(sound.glob("*.index.json")))), sound / MANIFEST
    text, before = path.read_bytes(), manifest.read_bytes()
    try:
        path.write_bytes(changed(text, data.draw))
        own = sha256(path.read_bytes()).hexdigest()
        tree = json.loads(before)
        tree["shards"][0]["index_sha256"] = own
        manifest.write_text(json.dumps(tree, indent=1))
        use(sound)
    finally:
        path.write_bytes(text)
        manifest.write_bytes(before)


@given(content=st.binary(max_size=40) | STRANGE.map(lambda value: json.dumps(value).encode()))
@example(content=DEEP)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_run_json_is_read_or_is_a_users_mistake(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except UserError as error:
        assert "run.json" in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", DEEP, b"\xff\xfe", b'{"shards": ' + DEEP, b'\n "shards": [\n']
)
def test_what_is_no_manifest_at_all_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        ShardSet(tmp_path)


def test_a_manifest_that_contradicts_itself_is_said(sound: Path, tmp_path: Path) -> None:
    tree = json.loads((sound / MANIFEST).read_bytes())
    first = tree["shards"][0]
    cases = {
        "its shards have": {"num_samples": tree["num_samples"] + 1},
        f"{first['name']} several times": {
            "shards": [*tree["shards"], first],
            "num_samples": tree["num_samples"] + first["samples"],
        },
        "not that of a .tar": {"shards": [{**first, "name": "../a.tar"}]},
        "samples is not a number": {"shards": [{**first, "samples": -1}]},
        "bytes is not a number": {"shards": [{**first, "bytes": 2**63}]},
        "sha256 is not a SHA-256": {"shards": [{**first, "sha256": "0"}]},
    }
    for message, change in cases.items():
        (tmp_path / MANIFEST).write_text(json.dumps(tree | change, indent=1))
        with pytest.raises(UserError, match=message):
            ShardSet(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -1}, "outside of the shard"),
        ({"bytes": 2**62}, "outside of the shard"),
        ({"num_frames": 0}, "0 frames"),
        ({"label": 7}, "label 7"),
        ({"labels_by_set": {"verb": 0}}, "label 0 of verb"),
    ],
)
def test_an_index_that_contradicts_the_manifest_is_said(
    sound: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "shards")
    tree = json.loads((folder / MANIFEST).read_bytes())
    path = folder / tree["shards"][0]["name"].replace(".tar", ".index.json")
    index = json.loads(path.read_bytes())
    index["samples"][0] |= change
    path.write_text(json.dumps(index))
    tree["shards"][0]["index_sha256"] = sha256(path.read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        ShardSet(folder).index(0)
