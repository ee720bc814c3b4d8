"""Peak memory of training steps by PyTorch's allocator and by the planner, for test_fakecuda.py.

    python tests/fakecuda/memory.py CASES.json

CASES as of tests/benchmark/measure_peak.py. Prints predicted over allocated, a line for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from arvideo_ds.engine.world import start_world
from tests.benchmark.measure_peak import predicted_over_measured
from tests.fakecuda import counts


def main() -> None:
    counts.prepare()
    device = start_world().device
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print("RESULT " + json.dumps(predicted_over_measured(case, device)), flush=True)


if __name__ == "__main__":
    main()
