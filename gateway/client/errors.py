"""What a user of the client library can be told, as one tree.

ClientError
├── MessageRefused      the gateway said no to this message; others are not touched
├── MessageTooLarge     it is larger than the gateway takes; nothing was sent
├── OutcomeUnknown      it was sent, and whether it was taken cannot be found out any more
└── SessionEnded        the connection is over for good: refused, replaced, or closed by us
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of all expected failures."""


class MessageRefused(ClientError):
    """The gateway refused a message for good. It was not carried out."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        """Stable, for programs: ``ALREADY_DECIDED``, ``INVALID_MESSAGE``, …"""
        self.message = message
        self.retryable = retryable


class MessageTooLarge(ClientError):
    """A message larger than the gateway takes; it was not sent, for the gateway would close the socket."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"The message has {size} bytes and the gateway takes {limit}; send less.")
        self.size = size
        self.limit = limit


class OutcomeUnknown(ClientError):
    """A message was sent and not answered, and sending it again could do the work twice.

    So it is after the gateway lost the session's past (its epoch changed), and when the connection was gone
    for longer than the gateway remembers message ids. Look at what happened before you ask again.
    """


class SessionEnded(ClientError):
    """The session's connection is over and will not be made again.

    ``code`` is a WebSocket close code (protocol.md section 6); of an upgrade that was refused, the one that
    stands for its HTTP status. After 4401 open the session with a new token; after 4403 use another session.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} (close code {code})" if reason else f"close code {code}")
        self.code = code
        self.reason = reason
