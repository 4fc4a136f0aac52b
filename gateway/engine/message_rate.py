"""How fast one socket may speak: a share of its address's and its subject's rate, and an end to floods."""

from __future__ import annotations

from typing import Protocol

import trio

from gateway.core.errors import GatewayError, RateLimited
from gateway.core.identity import ANONYMOUS_SUBJECT, Identity
from gateway.core.rate_limit import RateLimiter, address_caller, subject_caller
from gateway.core.websocket_protocol import CloseCode
from gateway.ports import Telemetry

REFUSALS_PER_MINUTE = 600
"""Messages of one socket that may be refused for their rate: each costs a decoded message and an answer. Who
goes on faster than that, although told when to come back, is closed with 4429."""


class Endable(Protocol):
    """A socket that can be told to close."""

    def end(self, code: int, reason: str) -> None:
        """Close soon."""
        ...


class MessageRate:
    """Counts what one socket sends, valid or not; acknowledgements alone are free."""

    __slots__ = ("_address", "_limiter", "_refusals", "_socket", "_telemetry")

    def __init__(
        self, limiter: RateLimiter, client_address: str, socket: Endable, telemetry: Telemetry
    ) -> None:
        self._limiter = limiter
        self._address = address_caller(client_address)
        self._socket = socket
        self._telemetry = telemetry
        self._refusals: RateLimiter | None = None

    def check(self, identity: Identity) -> None:
        """Count one message. Raises ``RateLimited``; too many of these end the socket."""
        now = trio.current_time()
        try:
            self._limiter.check(self._address, now)
            if identity.subject != ANONYMOUS_SUBJECT and not identity.sees_all:
                self._limiter.check(subject_caller(identity.subject), now)
        except RateLimited:
            self._telemetry.count("gateway_rate_limited_total", what="messages")
            self._count_refusal(now)
            raise

    def refusal(self, identity: Identity, error: GatewayError) -> GatewayError:
        """What to answer a message that is refused for ``error``: it counts like one that is valid."""
        try:
            self.check(identity)
        except RateLimited as limited:
            return limited
        return error

    def _count_refusal(self, now: float) -> None:
        if self._refusals is None:
            self._refusals = RateLimiter(REFUSALS_PER_MINUTE, max_callers=1)
        try:
            self._refusals.check("", now)
        except RateLimited:
            self._socket.end(CloseCode.RATE_LIMITED, "too many messages, although told to wait")
