"""Forward and backward pass of every task on the imaginary GPU, for test_fakecuda.py.

Prints a line of JSON for each: what failed, if anything. A tensor on another device, of another
type, or read back by the host is an error here.
"""

from __future__ import annotations

import json

import torch

from tests.fakecuda import counts
from tests.tasks.test_devices import TASKS, batch_of, task_of


def run(name: str, precision: torch.dtype) -> None:
    cuda = torch.device("cuda")
    batch = batch_of(name).pin_memory()
    task = task_of(name).to(cuda, precision)
    task(batch.to(cuda)).backward()  # constants are sent once
    task.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    task(batch.to(cuda)).backward()
    missing = [n for n, p in task.named_parameters() if p.grad is None or not p.grad.is_cuda]
    if missing:
        raise AssertionError(f"no gradient on the GPU: {missing}")


def main() -> None:
    counts.prepare()
    for name in TASKS:
        for precision in (torch.float32, torch.bfloat16):
            failed = ""
            try:
                run(name, precision)
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.set_sync_debug_mode("default")
            case = {"task": name, "precision": str(precision), "failed": failed}
            print("RESULT " + json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
