"""Whether a figure that was sampled over time grows."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

FLAT_SHARE = 0.05
"""A slope of less than this share of the mean in an hour counts as flat: allocators breathe by as much."""


@frozen
class Trend:
    """A figure over time."""

    first: float
    last: float
    least: float
    most: float
    mean: float
    slope_per_hour: float
    """Of the straight line with the least squares."""

    @property
    def is_flat(self) -> bool:
        """Whether it does not grow; that it shrinks is no fault."""
        return self.slope_per_hour <= FLAT_SHARE * self.mean


def trend_of(points: Sequence[tuple[float, float]]) -> Trend | None:
    """The trend of (seconds, value) pairs; None of fewer than two."""
    if len(points) < 2:
        return None
    times, values = zip(*points, strict=True)
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    slope = sum((time - mean_time) * (value - mean) for time, value in points) / spread if spread else 0.0
    return Trend(values[0], values[-1], min(values), max(values), mean, slope * 3600)
