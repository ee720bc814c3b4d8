"""A script with a fault: ARVIDEO_FAULT=kind:first_step:last_step:rank (see FAULTS).

ARVIDEO_SCRIPT is its name in scripts/, by default pretrain.py.

With ARVIDEO_OTHERS_HANG, the other ranks then wait forever, as in a collective of NCCL.

Every rank also writes what it trained on: trained-<rank>.jsonl in the working folder, a line a
micro-step.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.engine import checkpoints
from arvideo_ds.engine.build import Engine

KIND, FIRST, LAST, RANK = os.environ["ARVIDEO_FAULT"].split(":")


def nan_loss(loss: torch.Tensor) -> torch.Tensor:
    return loss * torch.nan


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss stays what it is; its gradient is none."""
    loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss


def crash(loss: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the fault of this test")


def kill(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


def hang(loss: torch.Tensor) -> torch.Tensor:
    time.sleep(3600)
    return loss


def interrupt(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGUSR1)
    return loss


FAULTS = {f.__name__: f for f in (nan_loss, infinite_gradient, crash, kill, hang, interrupt)}


def faulty_forward(self: Engine, batch: Any) -> torch.Tensor:
    loss = self.deepspeed(batch)
    step = self.deepspeed.global_steps + 1
    with Path(f"trained-{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "clips": batch.keys.tolist()}) + "\n")
    if int(FIRST) <= step <= int(LAST) and KIND in FAULTS:
        if os.environ["RANK"] == RANK:
            return FAULTS[KIND](loss)
        if "ARVIDEO_OTHERS_HANG" in os.environ:
            return hang(loss)
    return loss


def kill_while_saving(*arguments: Any, **options: Any) -> None:
    """All files are written, and none is accounted for yet."""
    if f"-{int(FIRST):08d}" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    finish(*arguments, **options)


Engine.forward = faulty_forward  # type: ignore[method-assign]
finish = checkpoints._finish
if KIND == "kill_while_saving":
    checkpoints._finish = kill_while_saving

name = os.environ.get("ARVIDEO_SCRIPT", "pretrain.py")
script = Path(__file__).parent.parent.parent / "scripts" / name
sys.path.insert(0, str(script.parent))
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
