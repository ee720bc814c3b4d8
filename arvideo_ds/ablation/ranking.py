"""Does the order of an ablation's rows agree with the paper's, and how far apart are they?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Differences of means below so many standard errors may be chance.
_ERRORS = 2.0


@dataclass(frozen=True)
class Spread:
    """Values over seeds; deviation of the sample, none for one value."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Pair:
    """Two rows that the paper sets apart, the one it has above first."""

    above: str
    below: str
    # Of the means, above less below: positive where we agree.
    difference: float
    # The difference is more than twice its standard error over the seeds.
    certain: bool


def compare(rows: Sequence[tuple[str, float | None, Spread | None]]) -> list[Pair]:
    """Every pair of measured rows (name, paper's figure, values) that the paper sets apart."""
    known = [(name, paper, found) for name, paper, found in rows if paper is not None and found]
    # Stable: rows that the paper has equal stay in the grid's order.
    known.sort(key=lambda row: -row[1])
    return [
        _pair(above[0], below[0], above[2], below[2])
        for above, below in itertools.combinations(known, 2)
        if above[1] > below[1]
    ]


def verdict(pairs: Sequence[Pair]) -> str:
    """Whether the order of the means agrees, and what of it is more than chance."""
    if not pairs:
        return "The paper has no order to compare with."
    agreeing = [pair for pair in pairs if pair.difference > 0]
    against = [pair for pair in pairs if pair.difference <= 0]
    text = (
        f"The order {'does not agree' if against else 'agrees'} with the paper's: {len(agreeing)} "
        f"of {len(pairs)} pairs of rows as in the paper ({_certain(agreeing)} certain)"
    )
    if not against:
        return text + "."
    named = [f"{pair.below} above {pair.above}" for pair in against if pair.certain]
    listed = f": {', '.join(named)}" if named else ""
    return f"{text}, {len(against)} not ({_certain(against)} certain{listed})."


def differences(rows: Sequence[tuple[str, Mapping[int, float]]]) -> str:
    """Every later row less the first one, over the seeds that both have. rows: seed -> value."""
    (first, base), *others = rows
    parts = []
    for name, values in others:
        paired = Spread(tuple(values[seed] - base[seed] for seed in values if seed in base))
        if not paired.values:
            continue
        part, error = f"{name} {paired.mean:+.1f}", _standard_error(paired)
        if math.isfinite(error):
            certain = "certain" if abs(paired.mean) > _ERRORS * error else "not certain"
            part += f" ± {error:.1f} ({certain})"
        parts.append(part)
    if not parts:
        return "Nothing to compare yet."
    return f"Against {first}, seed by seed, mean ± standard error: {', '.join(parts)}."


def _certain(pairs: Sequence[Pair]) -> int:
    return sum(pair.certain for pair in pairs)


def _pair(above: str, below: str, first: Spread, second: Spread) -> Pair:
    difference = first.mean - second.mean
    error = math.hypot(*(_standard_error(spread) for spread in (first, second)))
    return Pair(above, below, difference, abs(difference) > _ERRORS * error)


def _standard_error(spread: Spread) -> float:
    """Infinite for one value: nothing is known of the spread then."""
    deviation = spread.deviation
    return math.inf if deviation is None else deviation / math.sqrt(len(spread.values))
