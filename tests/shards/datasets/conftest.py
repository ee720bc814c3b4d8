"""Shared by the tests of the readers: folders of empty videos, genuine annotations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MakeVideos = Callable[..., Path]


@pytest.fixture
def make_videos(tmp_path: Path) -> MakeVideos:
    """Makes files of these names in a folder; readers look at names, not into files."""

    def make(*names: str, folder: str = "videos") -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        return root

    return make


@pytest.fixture(scope="session")
def annotations(real_videos: Path) -> Path:
    """The folder of genuine annotation files of the developers' machines."""
    folder = real_videos / "annotations"
    if not folder.is_dir():
        pytest.skip("no annotations in ../shared/data")
    return folder
