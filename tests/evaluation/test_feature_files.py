"""Feature files: names are safe and never shared; every format gives back what was put in."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.feature_files import FeatureFile, file_name, require_format
from tests.conftest import ROOT

KINDS = ["npz", "safetensors", "parquet"]
keys = st.one_of(
    st.text(min_size=1, max_size=200),
    st.lists(st.sampled_from(["a", "_", "/", "..", ".mp4", "A", "-"]), min_size=1).map("".join),
)


@given(keys, keys)
def test_names_stay_in_their_folder_and_tell_keys_apart(first: str, second: str) -> None:
    names = [file_name(key, "npz") for key in (first, second)]
    for name in names:
        assert Path(name).name == name
        assert len(name) < 120
        assert name.isascii()
        assert not name.startswith("-")
    assert (names[0] == names[1]) == (first == second)


def test_names_that_people_meet() -> None:
    assert file_name("a.mp4", "npz") == "a.mp4.npz"
    assert file_name("sub/a.mp4", "npz") == "sub__a.mp4.npz"
    hostile = ["sub__a.mp4", "../a.mp4", "/a.mp4", "..", "sub/../a.mp4", "a b.mp4"]
    names = {file_name(key, "npz") for key in [*hostile, "a.mp4", "sub/a.mp4"]}
    assert len(names) == len(hostile) + 2


def read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    arrays = {name: table[name].to_numpy() for name in table.column_names}
    shape = json.loads(table.schema.metadata[b"shape"])
    arrays["features"] = np.stack(arrays["features"]).reshape(shape)
    return arrays


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [(6,), (3, 6)])
def test_what_was_appended_comes_back(
    kind: str, inner: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        # More than one group of rows.
        monkeypatch.setattr("arvideo_ds.evaluation.feature_files._ROW_GROUP_BYTES", 150)
    values = torch.randn(5, *inner, generator=torch.Generator().manual_seed(0))
    windows = {"start_frame": np.arange(5), "start_s": np.arange(5) / 3}
    contents = []
    for name in ("one", "two"):
        file = FeatureFile(tmp_path / f"{name}.{kind}", kind)
        file.append(values[:2])
        file.append(values[2:])
        assert [path.suffix for path in tmp_path.glob(f"{name}*")] == [".partial"]
        assert file.finish(windows) == values.shape
        assert [path.name for path in tmp_path.glob(f"{name}*")] == [f"{name}.{kind}"]
        contents.append((tmp_path / f"{name}.{kind}").read_bytes())
    assert contents[0] == contents[1]
    arrays = read(tmp_path / f"one.{kind}")
    np.testing.assert_array_equal(arrays["features"], values.numpy())
    assert arrays["features"].dtype == np.float32
    for name, expected in windows.items():
        np.testing.assert_array_equal(arrays[name], expected)
        assert arrays[name].dtype == expected.dtype


def test_what_is_discarded_leaves_nothing(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "one.npz", "npz")
    file.append(torch.zeros(2, 3))
    file.discard()
    assert not list(tmp_path.iterdir())


def test_parquet_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="parquet"):
        require_format("parquet")
    require_format("npz")


def test_a_missing_library_is_reported_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the model nor the videos are there: they have not been looked at yet."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(tmp_path)
    options = ["videos", "--model", "run", "--output", "out", "--format", "parquet"]
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *options])
    script = runpy.run_path(str(ROOT / "scripts" / "extract_features.py"))
    assert script["main"]() == 2
    assert "arvideo_ds[parquet]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
