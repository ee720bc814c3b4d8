"""scripts/pretrain.py that counts how often the host reads a tensor: syncs.json in the folder.

A line for each read: the step under way, and whether DeepSpeed or our own code asked. On a GPU
each would wait for the device.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.train.heartbeat import Heartbeat

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "pretrain.py"
counts: Counter[str] = Counter()
now = ["start 0"]


def counted(name: str) -> Any:
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        files = [frame.filename for frame in traceback.extract_stack()[:-1]]
        who = "deepspeed" if any("/deepspeed/" in file for file in files) else "ours"
        counts[f"{now[0]} {who}"] += 1
        return original(self, *arguments, **options)

    return read


def beat(self: Heartbeat, phase: str, step: int) -> None:
    now[0] = f"{phase} {step}"
    original_beat(self, phase, step)


original_beat = Heartbeat.beat
Heartbeat.beat = beat  # type: ignore[method-assign]
for name in READS:
    setattr(torch.Tensor, name, counted(name))
sys.path.insert(0, str(SCRIPT.parent))
sys.argv[0] = str(SCRIPT)
try:
    runpy.run_path(str(SCRIPT), run_name="__main__")
finally:
    Path("syncs.json").write_text(json.dumps(counts))
