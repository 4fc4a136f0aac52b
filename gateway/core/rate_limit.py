"""Token buckets per caller, pure: time is an argument."""

from __future__ import annotations

import ipaddress

from gateway.core.errors import RateLimited

MAX_CALLERS = 20_000
"""Buckets held at once, about 2 MB. With more callers than that the ones longest unseen start afresh."""

_PERIOD = 60.0


class RateLimiter:
    """Lets each caller do something ``per_minute`` times a minute; 0 means without limit.

    A bucket holds one minute's worth, so a burst of that size passes and the average is kept after it. It is
    kept as one number, the time at which it will be full again (the generic cell rate algorithm, ITU-T
    I.371, which decides exactly as a token bucket does); a full bucket is not kept at all.
    """

    def __init__(self, per_minute: int, *, max_callers: int = MAX_CALLERS) -> None:
        self._interval = _PERIOD / per_minute if per_minute > 0 else 0.0
        self._max_callers = max_callers
        self._full_at: dict[str, float] = {}
        """By caller; in the order they were last seen."""

    def check(self, caller: str, now: float) -> None:
        """Take one token of ``caller``. Raises ``RateLimited``, which says when to come back.

        ``now`` is seconds on a clock that does not go back. A refused attempt takes nothing.
        """
        if not self._interval:
            return
        # Taken out and put back at the end, refused or not: who keeps coming is not forgotten for others.
        before = max(self._full_at.pop(caller, now), now)
        after = before + self._interval
        wait = after - now - _PERIOD
        # The tolerance is far below an interval and above what adding up floats loses.
        if wait > self._interval * 1e-6:
            self._full_at[caller] = before
            raise RateLimited(f"Too many requests; come back in {max(1, round(wait))} s.", retry_after=wait)
        self._full_at[caller] = after
        if len(self._full_at) > self._max_callers:
            del self._full_at[next(iter(self._full_at))]

    def __len__(self) -> int:
        return len(self._full_at)


def subject_caller(subject: str) -> str:
    """The bucket of a subject; never that of an address."""
    return f"subject {subject}"


def address_caller(address: str) -> str:
    """The bucket of a network address.

    IPv6 addresses share one per /64, which is what one subscriber is given; IPv4 written as IPv6 counts as
    IPv4.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"address {address[:64]}"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return f"address {ipaddress.IPv6Network((parsed, 64), strict=False)}"
        parsed = parsed.ipv4_mapped
    return f"address {parsed}"
