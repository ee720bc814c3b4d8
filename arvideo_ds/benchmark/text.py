"""The figures of a row in words, and a document with rounded numbers."""

from __future__ import annotations

from typing import Any


def one_line(result: dict[str, Any]) -> str:
    line = (
        f"{result['row']}: {result['clips_per_s']['median']:.2f} clips/s, "
        f"{result['forward_ms']['median']:.1f} + {result['backward_ms']['median']:.1f} + "
        f"{result['optimizer_ms']['median']:.1f} ms (forward, backward, optimiser), "
        f"{result['peak_gib']:.2f} GiB, {result['share_of_matmul_pct']:.0f} % of a matrix product"
    )
    if "against_first" in result:
        against = result["against_first"]
        line += (
            f"; {against['time_pct']['median']:+.1f} % time, {against['memory_pct']:+.1f} % memory"
        )
    return line


def table(profile: dict[str, Any] | None) -> list[str]:
    """Groups of operators, and by name those of the rest that take half a percent and more."""
    if profile is None:
        return []
    lines = [(name, of, "") for name, of in profile["groups"].items()]
    lines += [
        (name, of, "  ") for name, of in profile["rest_by_name"].items() if of["share_pct"] >= 0.5
    ]
    return [f"{of['share_pct']:8.2f} % {of['ms']:12.3f} ms  {pad}{name}" for name, of, pad in lines]


def rounded(value: Any) -> Any:
    """Floats to five digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
