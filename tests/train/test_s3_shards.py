"""A real run whose shards are in s3-like storage that is gone for five seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shards.s3_server import KEY, SECRET, serve_s3
from tests.textured_set import repeat_shards
from tests.train.conftest import Runs

pytestmark = pytest.mark.slow

STEPS = 100
SETTINGS = (
    "data.workers=2",
    "data.repeats=1",
    "data.window_shards=1",
    f"train.max_steps={STEPS}",
    "train.total_batch=4",
    "train.micro_batch=4",
)


def test_a_run_from_s3_outlives_an_outage_and_equals_a_run_from_the_folder(
    runs: Runs, demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps, 2 workers, 5 s without a server: exit code 0, all losses equal to the bit, no
    video skipped, no credentials in what the run writes."""
    folder = tmp_path / "shards"
    repeat_shards(demo_shards / "train", folder, 6)
    names = sorted(path.name for path in folder.glob("*.tar"))
    runs.run("local", f"data.shards={folder}", *SETTINGS)
    with serve_s3() as server:
        for name, value in server.environment.items():
            monkeypatch.setitem(runs.environment, name, value)
        monkeypatch.setitem(runs.environment, "ARVIDEO_CACHE", str(tmp_path / "cache"))
        url = server.put(folder, "bucket")
        planned = runs.run("planned", "--dry_run", f"data.shards={url}", *SETTINGS)
        assert url in planned
        server.outage_at, server.outage_s = names[3], 5
        output = runs.run("s3", f"data.shards={url}", *SETTINGS)
        assert server.outages == 1
    assert {name: server.gets[name] for name in names} == {n: 1 + (n == names[3]) for n in names}
    steps = runs.metrics("s3")
    assert len(steps) == STEPS
    assert {step["data/skipped_total"] for step in steps} == {0}
    assert runs.losses("s3") == runs.losses("local")
    files = [path for path in (runs.folder / "s3").rglob("*") if path.is_file()]
    assert len(files) > 5
    for text in (output.encode(), *(path.read_bytes() for path in files)):
        assert SECRET.encode() not in text and KEY.encode() not in text
