"""One recipe, one curve: whatever the stage, accumulation, recomputation and offload.

Also on the features of a frozen teacher, whose weights stay as they are, and of a moving average.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.mark.dist
@pytest.mark.slow
def test_every_way_of_running_gives_one_curve(
    on_ranks: Callable[..., dict[str, list[float]]],
) -> None:
    curves = on_ranks("matrix.py", 2, timeout=1200)
    assert len(curves) == 4 * 4 + 3 * 2 + 4 + 2 * 4
    differences = {}
    for name, curve in curves.items():
        precision = name.split("-")[1]
        lowest = {"fp32": 0, "bf16": 1}[precision]
        teacher = name.rpartition("-")[2]
        way = teacher if teacher in ("taught", "ema") else "1-False-False"
        reference = curves[f"{lowest}-{precision}-{way}"]
        assert curve[-1] < 0.9 * curve[0], "it learns something"
        differences[name] = max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))
    print(json.dumps(differences, indent=1))
    assert {n: d for n, d in differences.items() if d > ALLOWED[n.split("-")[1]]} == {}
