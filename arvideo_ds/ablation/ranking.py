"""Compare the order of an ablation's rows with the paper's order, and rows with the first row."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Student's t: a difference of this many standard errors has p = 5 %, by degrees of freedom from 1.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120,
)  # fmt: skip
# With fewer pairs no result of the test is below 5 %; with more there are too many sign patterns.
_TESTED = range(6, 17)


@dataclass(frozen=True)
class Pair:
    """Two rows with different figures in the paper, the higher first.

    difference: of our means, `above` minus `below`; positive where we agree. significant: at 5 %,
    by Welch's t test over the seeds.
    """

    above: str
    below: str
    difference: float
    significant: bool


def compare(rows: Sequence[tuple[str, float | None, Sequence[float]]]) -> list[Pair]:
    """Pairs of measured rows with different figures in the paper.

    rows: name, the paper's figure, our values by seed.
    """
    known = [(name, paper, ours) for name, paper, ours in rows if paper is not None and ours]
    # Stable: rows with equal figures keep the grid's order.
    known.sort(key=lambda row: -row[1])
    pairs = []
    for (above, higher, first), (below, lower, second) in itertools.combinations(known, 2):
        if higher > lower:
            difference = statistics.mean(first) - statistics.mean(second)
            pairs.append(Pair(above, below, difference, _differ(first, second)))
    return pairs


def verdict(pairs: Sequence[Pair]) -> str:
    """Whether the order of the means agrees with the paper's, and which pairs are significant."""
    if not pairs:
        return "The paper has no order to compare with."
    agreeing = [pair for pair in pairs if pair.difference > 0]
    against = [pair for pair in pairs if pair.difference <= 0]
    text = (
        f"The order {'does not agree' if against else 'agrees'} with the paper's: {len(agreeing)} "
        f"of {len(pairs)} pairs of rows as in the paper ({_significant(agreeing)} significant)"
    )
    if not against:
        return text + "."
    names = [f"{pair.below} above {pair.above}" for pair in against if pair.significant]
    listed = f": {', '.join(names)}" if names else ""
    return f"{text}, {len(against)} not ({_significant(against)} significant{listed})."


def differences(rows: Sequence[tuple[str, Mapping[Any, float]]]) -> str:
    """Every later row minus the first, cell by cell. rows: name, (fold, seed) -> value."""
    (first, base), *others = rows
    parts = []
    for name, values in others:
        paired = [values[number] - base[number] for number in values if number in base]
        if not paired:
            continue
        mean, error = statistics.mean(paired), _standard_error(paired)
        part = f"{name} {mean:+.1f}"
        if math.isfinite(error):
            significant = abs(mean) > _student(len(paired) - 1) * error
            test = f", p = {sign_flip_test(paired):.2g}" if len(paired) in _TESTED else ""
            part += f" ± {error:.1f} ({'' if significant else 'not '}significant{test})"
        parts.append(part)
    if not parts:
        return "Nothing to compare yet."
    return f"Against {first}, seed by seed, mean ± standard error: {', '.join(parts)}."


def sign_flip_test(paired: Sequence[float]) -> float:
    """Two-sided p of paired differences: the share of all sign patterns (2^n) with as large a mean.

    Exact, without an assumption on the distribution but that the sign of each difference is as
    likely either way (Fisher's randomisation test).
    """
    least = abs(sum(paired)) * (1 - 1e-9)
    sums = (
        sum(sign * value for sign, value in zip(signs, paired, strict=True))
        for signs in itertools.product((1, -1), repeat=len(paired))
    )
    return sum(abs(total) >= least for total in sums) / 2 ** len(paired)


def _significant(pairs: Sequence[Pair]) -> int:
    return sum(pair.significant for pair in pairs)


def _differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Welch's t test at 5 %; never where a row has one value."""
    variances = [_standard_error(values) ** 2 for values in (first, second)]
    error, difference = math.sqrt(sum(variances)), statistics.mean(first) - statistics.mean(second)
    if error in (0, math.inf):
        return error == 0 != difference
    parts = (v**2 / (len(row) - 1) for v, row in zip(variances, (first, second), strict=True))
    return abs(difference) > _student(sum(variances) ** 2 / sum(parts)) * error


def _student(freedom: float) -> float:
    """Standard errors at p = 5 %, for the next smaller listed degrees of freedom."""
    return _STUDENT[min(int(freedom + 1e-9), len(_STUDENT)) - 1]


def _standard_error(values: Sequence[float]) -> float:
    """Infinite for one value, whose spread is unknown."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
