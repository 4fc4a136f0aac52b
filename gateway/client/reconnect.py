"""Whether to come back after a socket ended, and when (protocol.md section 6). Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable

from attrs import frozen

BACKOFF_BASE = 0.5
BACKOFF_CAP = 30.0
LONGEST_RETRY_AFTER = 300.0
"""A wish for a longer pause is cut to this: nobody watches a client that sleeps for a day."""

ABNORMAL = 1006
"""RFC 6455 section 7.1.5: the connection ended without a close frame."""

_FINAL_CODES = frozenset({1000, 1009, 4400, 4403})


@frozen
class Ending:
    """How a socket ended, or why it could not be opened."""

    code: int
    """Close code; ``ABNORMAL`` without one; of a refused upgrade, the code that stands for its status."""
    reason: str
    retry_after: float | None = None
    """Seconds that the gateway asked to wait."""


class Verdict(enum.Enum):
    """What to do after a socket ended."""

    RECONNECT = enum.auto()
    NEW_TOKEN = enum.auto()
    """Get a token first, then reconnect."""
    END = enum.auto()


def judge(code: int) -> Verdict:
    """What a close code asks for. A code that the protocol does not name is taken for an accident."""
    if code in _FINAL_CODES:
        return Verdict.END
    return Verdict.NEW_TOKEN if code == 4401 else Verdict.RECONNECT


def close_code_of_status(status: int) -> int:
    """The close code that means the same as the HTTP status of a refused upgrade."""
    named = {401: 4401, 403: 4403, 429: 4429, 503: 1013}.get(status)
    if named is not None:
        return named
    return 4400 if 400 <= status < 500 and status != 408 else ABNORMAL


class Backoff:
    """Full jitter: a delay between 0 and a bound that doubles with each attempt in vain, 0.5 s to 30 s.

    Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.attempts = 0

    def reset(self) -> None:
        """The connection has proved good."""
        self.attempts = 0

    def next_delay(self, *, at_least: float | None = None) -> float:
        """Seconds to wait before the next attempt."""
        bound = min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(self.attempts, 16))
        self.attempts += 1
        delay = self._random() * bound
        return delay if at_least is None else max(delay, min(at_least, LONGEST_RETRY_AFTER))
