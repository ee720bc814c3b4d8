"""Final weights know the hash of their tensors; nobody reads a damaged file of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from arvideo_ds.errors import UserError
from arvideo_ds.files.tensors import load_tensors, save_tensors
from arvideo_ds.models.weight_files import read_weights

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "number": torch.tensor(3),
    "empty": torch.empty(0, 2),
}


def test_what_was_saved_is_loaded_by_us_and_by_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(TENSORS, path)
    for loaded in (load_tensors(path), load_file(path)):
        assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in random order."""
    path = tmp_path / "model.safetensors"
    contents = set()
    for _ in range(20):
        save_tensors(TENSORS, path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_a_flipped_bit_in_any_byte_is_never_loaded_as_other_weights(tmp_path: Path) -> None:
    path, damaged = tmp_path / "model.safetensors", tmp_path / "damaged.safetensors"
    save_tensors(TENSORS, path)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            loaded = load_tensors(damaged)
        except (UserError, SafetensorError, OSError):
            continue
        # A bit of a name in the metadata, or of white space: every tensor is as it was.
        assert set(loaded) == set(TENSORS)
        assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())


def test_readers_of_weights_refuse_it_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(TENSORS, path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*SHA-256.*command again"):
        read_weights(tmp_path)


def test_a_file_without_a_hash_is_loaded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path)
    assert set(load_tensors(path)) == set(TENSORS)
