"""Whether this node should be sent work, asked often and found out seldom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from gateway.core.errors import GatewayError

MAX_AGE = 1.0
"""Seconds that a finding counts. Proving that the store can be written costs a write, and anybody may ask."""


class Readiness:
    """Asks ``check`` (which raises ``GatewayError`` when not ready) at most once a second, one at a time."""

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check
        self._lock = trio.Lock()
        self._checked_at = float("-inf")
        self._problem: GatewayError | None = None

    async def problem(self) -> GatewayError | None:
        """Why this node is not ready; None when it is. Not older than a second."""
        async with self._lock:
            if trio.current_time() - self._checked_at >= MAX_AGE:
                self._problem = None
                try:
                    await self._check()
                except GatewayError as error:
                    self._problem = error
                self._checked_at = trio.current_time()
            return self._problem
