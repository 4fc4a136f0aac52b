"""What a session asks of a socket that is attached to it."""

from __future__ import annotations

from typing import Protocol

from gateway.core.effects import Accepted, Refused


class Attachment(Protocol):
    """A socket as its session sees it. None of these may block."""

    @property
    def is_v2(self) -> bool:
        """Whether its client sends ids, so that it may safely send again."""
        ...

    @property
    def confirmed_seq(self) -> int:
        """Up to where this socket is known to be served: acknowledged (v2), or in the kernel's hands (v1)."""
        ...

    def flush_nowait(self) -> None:
        """Send what can be sent of the events up to the session's ``visible_seq``."""
        ...

    def answer(self, effect: Accepted | Refused) -> None:
        """Tell the client what became of a message of its own."""
        ...

    def resynchronize(self, reason: str) -> None:
        """What the client has may not be what it should have: send a v2 client a snapshot."""
        ...

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon: the session cannot go on with it."""
        ...
