"""A real run whose shards lie behind a web server that is not always well."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shards.faulty_server import serve
from tests.textured_set import repeat_shards
from tests.train.conftest import Runs

pytestmark = pytest.mark.slow


def test_a_run_with_data_workers_over_http_outlives_the_servers_troubles(
    runs: Runs, demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One 500, one dropped connection, one stall of 3 s: exit code 0, each shard fetched once."""
    repeat_shards(demo_shards / "train", tmp_path / "shards", 3)
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.tar"))
    monkeypatch.setitem(runs.environment, "ARVIDEO_CACHE", str(tmp_path / "cache"))
    with serve(tmp_path / "shards", stall_s=3) as server:
        for name, fault in zip(names, ("500", "drop", "stall"), strict=True):
            server.faults[name] = [fault]
        runs.run("http", f"data.shards={server.url}", "data.workers=2", "train.max_steps=9")
    assert [server.whole[name] for name in names] == [1, 1, 1]
    assert [server.gets[name] for name in names] == [2, 2, 1]
    steps = runs.metrics("http")
    assert len(steps) == 9
    assert {step["data/skipped_total"] for step in steps} == {0}
    print({"whole": dict(server.whole), "gets": dict(server.gets)})
