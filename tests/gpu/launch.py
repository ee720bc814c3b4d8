"""Run `arvideo` in this process, on a real GPU or on that of tests/fakecuda.

python tests/gpu/launch.py pretrain --recipe demo ...
"""

from __future__ import annotations

import os
import sys
from typing import Any


def prepare() -> None:
    """Switch off what an imaginary GPU cannot do, if this is one (FAKECUDA is set)."""
    if "FAKECUDA" not in os.environ:
        return
    from torch.profiler import ProfilerActivity, profile

    from arvideo_ds.benchmark import operators
    from arvideo_ds.train.guard import Guard
    from tests.fakecuda import counts

    counts.prepare()
    # Losses mean nothing there.
    Guard.require_health = lambda *_: None  # type: ignore[method-assign]

    def profile_host(activities: Any, **named: Any) -> Any:
        return profile(activities=[ProfilerActivity.CPU], **named)

    # NVIDIA's library of traces (CUPTI) looks for a real driver.
    operators.profile = profile_host  # type: ignore[assignment, misc]


if __name__ == "__main__":
    prepare()
    from arvideo_ds.cli import main

    sys.exit(main())
