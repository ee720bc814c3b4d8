"""Groups of samples, such as clips of one film, and splits that keep each group on one side.

Otherwise a test measures memory: clips of one film are near copies.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from arvideo_ds.errors import UserError

Label = TypeVar("Label", bound=Hashable)
_SHOWN = 5


class Grouping:
    """The group of each sample, from its facts.

    group_by: the name of a fact, or a regular expression with one group, for the source path or,
    where that does not match, the key. Errors: `UserError` where it is neither.
    """

    def __init__(self, group_by: str) -> None:
        self._group_by = group_by
        self._pattern = None if group_by.isidentifier() else _pattern(group_by)
        # Sample keys and, for a pattern, source paths.
        self._without: list[str] = []
        self._num_samples = 0
        self._fact_names: tuple[str, ...] = ()

    def group_of(self, key: str, facts: Mapping[str, Any]) -> str:
        """The group or "", which `require_all` reports. Errors: `UserError` for a list or dict."""
        self._num_samples += 1
        self._fact_names = self._fact_names or tuple(facts)
        if self._pattern is not None:
            match = self._pattern.search(str(facts["source_path"])) or self._pattern.search(key)
            value = match[1] if match else None
        else:
            value = facts.get(self._group_by)
        if isinstance(value, list | dict):
            raise UserError(
                f"--group_by {self._group_by}: this is a {type(value).__name__} in the facts of "
                f"{key}; expected a text or a number."
            )
        group = "" if value is None else str(value)
        if not group:
            searched = f"{facts['source_path']} ({key})"
            self._without.append(key if self._pattern is None else searched)
        return group

    def require_all(self) -> None:
        """Errors: `UserError` where a sample has no group."""
        if not self._without:
            return
        problem = "do not match, neither in their source path nor in their key (in brackets)"
        if self._pattern is None:
            names = ", ".join(map(repr, self._fact_names))
            problem = f"have no '{self._group_by}' in their facts (which are {names})"
        more = f" and {len(self._without) - _SHOWN:,} more" * (len(self._without) > _SHOWN)
        raise UserError(
            f"--group_by {self._group_by}: {len(self._without):,} of the {self._num_samples:,} "
            f"samples {problem}, such as {', '.join(self._without[:_SHOWN])}{more}."
        )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(
            f"--group_by {text} is neither the name of a fact nor a regular expression ({error})."
        ) from None
    if pattern.groups != 1:
        raise UserError(
            f"--group_by {text} must have exactly one group, (...), but has {pattern.groups}; for "
            "the folder of a video, for example: '^(.*)/'."
        )
    return pattern


def choose_groups(members: Mapping[str, Sequence[Label]], share: Fraction) -> set[str]:
    """The groups of the first side of a split, with about `share` of each label.

    members: group -> labels of its samples, groups in random order. Large groups come first; each
    goes to the first side where that brings the counts nearer to the share.
    """
    goal: dict[Label, Fraction] = defaultdict(Fraction)
    for labels in members.values():
        for label in labels:
            goal[label] += share
    missing, chosen = dict(goal), set[str]()
    # A stable sort: groups of one size stay in random order.
    for group in sorted(members, key=lambda group: -len(members[group])):
        counts = Counter(members[group])
        # By label and in total: small remainders must not add up.
        gain = sum(n * (2 * missing[label] - n) for label, n in counts.items())
        total = len(members[group])
        if gain + total * (2 * sum(missing.values()) - total) > 0:
            chosen.add(group)
            for label, n in counts.items():
                missing[label] -= n
    return chosen
