"""Figures out of many figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


def percentiles_ms(nanoseconds: Sequence[int]) -> dict[str, float] | None:
    """p50, p99 and p99.9 in milliseconds, each a value that was measured; None of nothing."""
    if not nanoseconds:
        return None
    ordered = sorted(nanoseconds)
    last = len(ordered) - 1
    return {
        name: round(ordered[min(last, int(len(ordered) * share))] / 1e6, 3)
        for name, share in PERCENTILES.items()
    }


def median_p99_ms(nanoseconds: Sequence[int], marks: Sequence[int]) -> float | None:
    """The median of the p99s of the spans that begin at ``marks``; None when none of them has 100 values."""
    spans = [nanoseconds[begin:end] for begin, end in itertools.pairwise(marks)]
    found = [figures["p99"] for span in spans if len(span) >= 100 and (figures := percentiles_ms(span))]
    return round(median(found), 3) if found else None


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle. Raises ``ValueError`` of nothing."""
    if not values:
        raise ValueError("there is no median of nothing")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
