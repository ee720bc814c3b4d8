"""verify_shards.py: sound shards pass; whatever was altered is found, and named by file and key."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.ingest import Sample
from arvideo_ds.shards.members import read_facts
from arvideo_ds.shards.reshard import merged, open_pool, write_part
from arvideo_ds.shards.store import Store
from arvideo_ds.shards.verify import Problem, Verification, check_shard, verify
from arvideo_ds.shards.writer import write_manifest, write_shard
from tests.conftest import ROOT, run_script

# They start processes again and again: not for every `make check`.
pytestmark = pytest.mark.slow

SCRIPT = ROOT / "data_tools" / "verify_shards.py"
BLOCK = 512


@pytest.fixture(scope="module")
def sound(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 48 training videos in three shards."""
    pool = open_pool([demo_shards / "train"], seed=0)
    part = merged(pool, tmp_path_factory.mktemp("sound"))
    write_part(pool, part, how="all", samples_per_shard=16)
    return part.folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(sound, tmp_path / "shards")


def check(folder: Path, *, decode_share: float = 0.01, seed: int = 0) -> Verification:
    return verify(folder, decode_share=decode_share, workers=1, seed=seed, timeout_s=60)


def shard_problems(folder: Path) -> list[Problem]:
    """What is wrong with the shards themselves, found in this process: no video is decoded."""
    manifest = m.ShardSet(folder).manifest
    return [
        problem
        for entry in manifest.shards
        for problem in check_shard(Store(folder), entry, manifest.names_by_set)
    ]


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = run_script(SCRIPT, folder, *options)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def first_shard(folder: Path) -> tuple[Path, m.ShardIndex]:
    shards = m.ShardSet(folder)
    return folder / shards.manifest.shards[0].name, shards.index(0)


def test_sound_shards_pass_whatever_share_is_decoded(sound: Path) -> None:
    for share, decoded in ((0.01, 3), (0.5, 24), (1.0, 48)):
        done = check(sound, decode_share=share)
        assert not done.problems
        assert (done.num_shards, done.num_samples, done.num_decoded) == (3, 48, decoded)
        assert done.bytes == sum(path.stat().st_size for path in sound.glob("*.tar"))


def test_the_command_ends_with_0_and_a_summary(sound: Path) -> None:
    done = command(sound, "--decode", "all", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sound}: sound" in done.stdout
    assert "3 shards, 48 samples" in done.stdout
    assert "MiB/s" in done.stdout
    assert "decoded: 48 videos" in done.stdout


def test_a_tar_cut_between_members_is_found_and_every_lost_sample_named(folder: Path) -> None:
    path, index = first_shard(folder)
    kept, lost = index.samples[:5], index.samples[5:]
    # Videos come last of their sample; data are padded to whole blocks.
    end = kept[-1].offset + -(-kept[-1].bytes // BLOCK) * BLOCK
    with path.open("r+b") as file:
        file.truncate(end)
    done = command(folder)
    assert done.returncode == 1
    assert f"{path.name}: has {end} bytes" in done.stdout
    for sample in lost:
        assert f"{path.name}: {sample.key}: is in the index, but not in the tar" in done.stdout
    assert not [sample.key for sample in kept if sample.key in done.stdout]
    assert "NOT SOUND" in done.stdout


def test_a_tar_cut_within_a_member_is_found(folder: Path) -> None:
    path, index = first_shard(folder)
    sample = index.samples[5]
    with path.open("r+b") as file:
        file.truncate(sample.offset + sample.bytes // 2)
    problems = check(folder).problems
    assert {problem.file for problem in problems} == {path.name}
    assert {problem.key for problem in problems} == {
        None,
        *(sample.key for sample in index.samples[5:]),
    }


@pytest.mark.parametrize("place", ["video", "facts", "header", "padding", "end"])
def test_one_byte_altered_anywhere_is_found(folder: Path, place: str) -> None:
    path, index = first_shard(folder)
    sample = index.samples[3]
    offset = {
        "video": sample.offset + sample.bytes // 2,
        # The facts' text ends before the video's header does; the last block of it is in use.
        "facts": sample.offset - 2 * BLOCK + 20,
        "header": sample.offset - BLOCK + 3,
        "padding": sample.offset - 1,
        "end": path.stat().st_size - 1,
    }[place]
    alter(path, offset)
    problems = shard_problems(folder)
    assert {problem.file for problem in problems} == {path.name}
    assert any("SHA-256" in problem.message for problem in problems if problem.key is None)
    if place == "video":
        assert {problem.key for problem in problems} == {None, sample.key}


def alter(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def test_an_altered_or_missing_index_is_found(folder: Path) -> None:
    first, second, _ = sorted(folder.glob("*.index.json"))
    # It says the same as before, but not in the same bytes.
    first.write_bytes(first.read_bytes() + b"\n")
    second.unlink()
    assert {problem.file for problem in shard_problems(folder)} == {first.name, second.name}


def test_missing_and_strange_tars_are_found(folder: Path) -> None:
    first, second, _ = sorted(folder.glob("*.tar"))
    shutil.copy(second, folder / "strange.tar")
    first.unlink()
    problems = {problem.file: problem.message for problem in check(folder).problems}
    assert problems.keys() == {first.name, "strange.tar"}
    assert "lacks" in problems[first.name]
    assert "does not name" in problems["strange.tar"]


def test_a_shard_all_of_whose_videos_were_left_out_is_no_stranger(folder: Path) -> None:
    write_shard(folder, "folder-train-000003.tar", (), "inputs")
    assert not check(folder).problems


def test_lost_rejects_are_found(folder: Path) -> None:
    (folder / m.REJECTS).unlink()
    assert [problem.file for problem in check(folder).problems] == [m.REJECTS]
    reject = m.Reject(source_path="a.mp4", reason="empty", message="")
    (folder / m.REJECTS).write_bytes(reject.model_dump_json().encode())
    assert "1 lines, the manifest says 0" in check(folder).problems[0].message


def seal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first index, and let the manifest vouch for it."""
    path = folder / m.ShardSet(folder).manifest.shards[0].index_name
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    seal_manifest(folder, {"index_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})


def seal_manifest(folder: Path, first_entry: dict[str, Any]) -> None:
    manifest = json.loads((folder / m.MANIFEST).read_bytes())
    manifest["shards"][0] |= first_entry
    (folder / m.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("field", ["offset", "bytes", "num_frames", "label", "key", "suffix"])
def test_an_index_that_disagrees_with_its_tar_is_found_though_the_hashes_hold(
    folder: Path, field: str
) -> None:
    sample = first_shard(folder)[1].samples[2]
    wrong = {"key": "other", "suffix": "avi"}.get(field) or getattr(sample, field) + 1

    def change(raw: dict[str, Any]) -> None:
        raw["samples"][2][field] = wrong

    seal(folder, change)
    named = " ".join(str(problem) for problem in shard_problems(folder))
    assert (wrong if field == "key" else sample.key) in named


def test_a_check_sum_that_training_would_refuse_is_found(folder: Path) -> None:
    sample = first_shard(folder)[1].samples[2]

    def change(raw: dict[str, Any]) -> None:
        raw["samples"][2]["crc32"] ^= 1

    seal(folder, change)
    (problem,) = check(folder, decode_share=1.0).problems
    assert problem.key == sample.key


@pytest.mark.parametrize("field", ["samples", "bytes", "sha256"])
def test_an_index_that_disagrees_with_the_manifest_is_found(folder: Path, field: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        if field == "samples":
            raw["samples"].pop()
        else:
            raw[f"shard_{field}"] = 1 if field == "bytes" else "0"

    seal(folder, change)
    assert "manifest" in str(shard_problems(folder)[0])


Samples = list[tuple[str, Sample]]


def samples_of(folder: Path) -> Samples:
    """The samples of the first shard as `write_shard` takes them."""
    path, index = first_shard(folder)
    shards = m.ShardSet(folder)
    return [
        (sample.key, Sample(shards.read(0, sample), sample.suffix, facts.model_dump()))
        for sample, facts in zip(index.samples, read_facts(path, index.samples), strict=True)
    ]


def write_set(folder: Path, shards: dict[str, Samples], labels: tuple[str, ...]) -> None:
    """Shards of any samples, with right hashes."""
    folder.mkdir()
    for name, samples in shards.items():
        write_shard(folder, name, samples, "inputs")
    indices = {
        name: m.ShardIndex.model_validate_json((folder / m.index_name(name)).read_bytes())
        for name in shards
    }
    write_manifest(folder, indices, [], dataset="d", split=None, labels=labels, settings={})


@pytest.mark.parametrize(
    "fault", ["more frames", "far fewer", "no video", "another label", "no such label"]
)
def test_samples_that_were_wrong_from_the_start_are_named(
    sound: Path, tmp_path: Path, fault: str
) -> None:
    samples, labels = samples_of(sound), m.ShardSet(sound).manifest.labels
    assert labels is not None
    key, sample = samples[4]
    changes: dict[str, Any] = {
        "more frames": {"num_frames": sample.facts["num_frames"] + 1},
        "far fewer": {"num_frames": sample.facts["num_frames"] * 3 // 4},
        "no video": {"sha256": hashlib.sha256(bytes(1000)).hexdigest(), "bytes": 1000},
        "another label": {"label": (sample.facts["label"] + 1) % len(labels)},
        "no such label": {"label": len(labels)},
    }[fault]
    video = bytes(1000) if fault == "no video" else sample.video
    samples[4] = (key, replace(sample, video=video, facts={**sample.facts, **changes}))
    write_set(tmp_path / "set", {"a.tar": samples}, labels)
    (problem,) = check(tmp_path / "set", decode_share=1.0).problems
    assert (problem.file, problem.key) == ("a.tar", key)


def test_decoders_may_have_agreed_on_a_few_frames_fewer(sound: Path, tmp_path: Path) -> None:
    samples, labels = samples_of(sound), m.ShardSet(sound).manifest.labels
    assert labels is not None
    key, sample = samples[4]
    facts = {**sample.facts, "num_frames": sample.facts["num_frames"] - 1}
    samples[4] = (key, replace(sample, facts=facts))
    write_set(tmp_path / "set", {"a.tar": samples}, labels)
    assert not check(tmp_path / "set", decode_share=1.0).problems


def test_a_key_in_two_shards_is_named(sound: Path, tmp_path: Path) -> None:
    samples, labels = samples_of(sound), m.ShardSet(sound).manifest.labels
    assert labels is not None
    write_set(tmp_path / "set", {"a.tar": samples[:3], "b.tar": samples[2:]}, labels)
    (problem,) = check(tmp_path / "set").problems
    assert (problem.file, problem.key) == ("b.tar", samples[2][0])
    assert "a.tar" in problem.message


@pytest.mark.parametrize(
    "name", ["/etc/evil.mp4", "../evil.mp4", "a/../../evil.mp4", "..\\evil.mp4", "C:\\evil.mp4"]
)
def test_members_that_would_be_unpacked_elsewhere_are_named(folder: Path, name: str) -> None:
    assert f"{name} would be unpacked outside" in with_member(folder, tarfile.TarInfo(name))


def test_links_in_a_tar_are_named(folder: Path) -> None:
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert "link.mp4 is a link" in with_member(folder, link)


def test_a_member_that_comes_twice_is_named(folder: Path) -> None:
    sample = first_shard(folder)[1].samples[0]
    name = f"{sample.key}.{sample.suffix}"
    assert f"{name} occurs 2 times" in with_member(folder, tarfile.TarInfo(name))


def test_a_member_of_no_sample_is_named(folder: Path) -> None:
    assert "extra.txt belongs to no sample" in with_member(folder, tarfile.TarInfo("extra.txt"))


@pytest.mark.parametrize("change", ["count", "twice"])
def test_a_manifest_that_disagrees_with_itself_is_found(folder: Path, change: str) -> None:
    manifest = json.loads((folder / m.MANIFEST).read_bytes())
    if change == "count":
        manifest["num_samples"] += 1
    else:
        manifest["shards"].append(manifest["shards"][0])
        manifest["num_samples"] += manifest["shards"][0]["samples"]
    (folder / m.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="49 samples" if change == "count" else "several times"):
        check(folder)


def with_member(folder: Path, member: tarfile.TarInfo) -> str:
    """The problems of a shard with a further member, for which index and manifest vouch."""
    path, _ = first_shard(folder)
    with tarfile.open(path, "a") as tar:
        tar.addfile(member, io.BytesIO(b""))
    size, digest = path.stat().st_size, sha256_of(path)

    def change(raw: dict[str, Any]) -> None:
        raw |= {"shard_bytes": size, "shard_sha256": digest}

    seal(folder, change)
    seal_manifest(folder, {"bytes": size, "sha256": digest})
    return " ".join(str(problem) for problem in shard_problems(folder))


def test_the_seed_chooses_what_is_decoded(sound: Path, tmp_path: Path) -> None:
    """A video that does not decode is found by some seeds, always by the same."""
    samples, labels = samples_of(sound), m.ShardSet(sound).manifest.labels
    assert labels is not None
    facts = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    key, sample = samples[0]
    samples[0] = (key, replace(sample, video=b"x", facts={**sample.facts, **facts}))
    write_set(tmp_path / "set", {"a.tar": samples[:2]}, labels)
    found = [bool(check(tmp_path / "set", seed=seed).problems) for seed in range(4)]
    assert any(found)
    assert not all(found)
    assert bool(check(tmp_path / "set", seed=3).problems) == found[3]


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--decode", "0"), "--decode"), (("--decode", "most"), "'all'"), (("--workers", "0"), "0")],
)
def test_wrong_options_end_with_2(sound: Path, options: tuple[str, ...], named: str) -> None:
    done = command(sound, *options)
    assert done.returncode == 2
    assert named in done.stderr


def test_a_folder_without_shards_ends_with_2(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2
    assert "arvideo shards" in done.stderr


@pytest.mark.parametrize("name", ["../shards.tar", "/tmp/shards.tar", "a\\b.tar"])
def test_a_manifest_that_leads_out_of_its_folder_is_not_followed(folder: Path, name: str) -> None:
    seal_manifest(folder, {"name": name})
    done = command(folder)
    assert done.returncode == 2
    assert m.MANIFEST in done.stderr
