"""Whole training runs on the imaginary GPU: waits of the host in them, for test_fakecuda.py.

    python tests/fakecuda/loop.py ARGUMENTS_OF_PRETRAIN

Prints how often the host waited, from the start to the end of the run.
"""

from __future__ import annotations

import json

from arvideo_ds.cli import pretrain
from arvideo_ds.train.guard import Guard
from tests.fakecuda import counts


def main() -> None:
    counts.prepare()
    # Losses mean nothing here.
    Guard.require_health = lambda *_: None
    counts.reset()
    code = pretrain.main()
    waits = {name: times for name, times in counts.events().items() if name.startswith("sync:")}
    print("RESULT " + json.dumps({"code": code, "waits": waits}), flush=True)


if __name__ == "__main__":
    main()
