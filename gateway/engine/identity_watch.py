"""Identity on a live socket: it expires, and v2 clients may renew it (protocol.md section 4)."""

from __future__ import annotations

from typing import Protocol

import trio

from gateway.core.errors import InvalidToken
from gateway.core.identity import Credentials, Identity
from gateway.core.websocket_protocol import CloseCode
from gateway.ports import Authenticator, Clock

EXPIRY_WARNING = 60.0
"""Seconds before expiry at which a v2 client is told: time to get a token, with room for one retry."""
LONGEST_WAIT = 3600.0
"""Wall clocks are set; one look an hour keeps a long-lived token's expiry honest."""


class HeldSocket(Protocol):
    """A socket as the watch over its holder needs it."""

    @property
    def is_v2(self) -> bool:
        """Whether its client can renew a token in band."""
        ...

    def send_control(self, fields: dict[str, object]) -> None:
        """Send one object."""
        ...

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon."""
        ...


class IdentityWatch:
    """Who holds a socket, kept true over its life."""

    __slots__ = ("_authenticator", "_clock", "_renewed", "_socket", "identity")

    def __init__(
        self, identity: Identity, socket: HeldSocket, *, authenticator: Authenticator, clock: Clock
    ) -> None:
        self.identity = identity
        self._socket = socket
        self._authenticator = authenticator
        self._clock = clock
        self._renewed: trio.Event | None = None

    async def run(self) -> None:
        """Warn (v2), then close the socket with 4401 when the identity expires and was not renewed."""
        warned = False
        while True:
            expires_at = self.identity.expires_at
            left = float("inf") if expires_at is None else expires_at - self._clock.now()
            if left <= 0:
                self._socket.end(CloseCode.NOT_AUTHENTICATED, "token expired")
                return
            if left <= EXPIRY_WARNING and self._socket.is_v2 and not warned:
                self._socket.send_control({"type": "token_expiring", "in_s": round(left, 1)})
                warned = True
            wait = left if warned or not self._socket.is_v2 else left - EXPIRY_WARNING
            self._renewed = trio.Event()
            with trio.move_on_after(min(wait, LONGEST_WAIT)):
                await self._renewed.wait()
                warned = False

    async def renew(self, token: str) -> None:
        """Take a fresh token of the same subject. Raises ``NotAuthenticated``; the old identity stays."""
        identity = await self._authenticator.authenticate(Credentials(bearer=token), socket=True)
        if identity.subject != self.identity.subject:
            raise InvalidToken("The new token is for another subject; this socket keeps the one it has.")
        self.identity = identity
        if self._renewed is not None:
            self._renewed.set()
        self._socket.send_control({"type": "authenticated", "expires_at": identity.expires_at})
