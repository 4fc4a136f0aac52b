"""The three dialects that a socket can speak, and the close codes of protocol.md section 6."""

from __future__ import annotations

import enum


class Dialect(enum.Enum):
    """What a socket speaks, settled at the handshake by ``Sec-WebSocket-Protocol``."""

    V1 = "v1"
    """No subprotocol: what IDE clients in the field speak. JSON text frames, one message each."""
    V2_JSON = "codelab.v2.json"
    """JSON text frames; one object or an array of them."""
    V2_MSGPACK = "codelab.v2.msgpack"
    """The same objects as MessagePack in binary frames."""

    @property
    def is_v2(self) -> bool:
        """Whether the socket speaks protocol v2 (seq, acks, idempotent messages)."""
        return self is not Dialect.V1

    @property
    def is_binary(self) -> bool:
        """Whether its data frames are binary (opcode 2) rather than text (opcode 1)."""
        return self is Dialect.V2_MSGPACK


class CloseCode(enum.IntEnum):
    """WebSocket close codes that the gateway sends (RFC 6455 section 7.4, protocol.md section 6)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    RESTARTING = 1012
    TRY_AGAIN_LATER = 1013
    BAD_HANDSHAKE = 4400
    NOT_AUTHENTICATED = 4401
    NOT_YOURS = 4403
    NO_PONG = 4408
    TOO_SLOW = 4413
    RATE_LIMITED = 4429
