"""What nodes tell each other about the sockets that one holds and the other serves, as bytes.

A *relay* is a client's socket on one node (which holds it) whose session runs on another (which serves it).
The holder numbers its relays. Format: a batch is a MessagePack array of its number and its letters, each an
array whose first item names its kind; a newer version may add items at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from attrs import frozen

from gateway.core.identity import Identity
from gateway.core.trace_context import TraceContext
from gateway.core.websocket_protocol import Dialect


@frozen
class Opened:
    """Holder → server: a client is there and was admitted."""

    relay: int
    session_id: str
    identity: Identity
    dialect: Dialect
    epoch: str | None
    """Where it wants to go on; None: it does not say."""
    last_seq: int
    client_address: str
    request_id: str
    trace: TraceContext | None = None


@frozen
class Said:
    """Holder → server: a data frame of the client."""

    relay: int
    frame: str | bytes


@frozen
class Took:
    """Holder → server: so many payloads, of all since it opened, are in the kernel's hands."""

    relay: int
    count: int


@frozen
class Gone:
    """Holder → server: the client's socket is over."""

    relay: int
    code: int
    reason: str


@frozen
class Sent:
    """Server → holder: payloads for the client."""

    relay: int
    payloads: tuple[bytes, ...]


@frozen
class Ended:
    """Server → holder: close the client's socket."""

    relay: int
    code: int
    reason: str


Letter = Opened | Said | Took | Gone | Sent | Ended

_NAMES: dict[type, str] = {Opened: "o", Said: "m", Took: "t", Gone: "g", Sent: "s", Ended: "e"}
_encoder = msgspec.msgpack.Encoder()


class UnreadableLetter(ValueError):
    """Bytes that no version of this format wrote, or that a newer one did."""


def encode_batch(number: int, letters: Sequence[Letter]) -> bytes:
    """Letters in the order of posting. ``number`` counts the batches from one node to another, from 0."""
    return _encoder.encode([number, *map(_fields, letters)])


def _fields(letter: Letter) -> list[object]:
    name = _NAMES[type(letter)]
    if isinstance(letter, Opened):
        identity, trace = letter.identity, letter.trace
        return [
            name,
            letter.relay,
            letter.session_id,
            [identity.subject, sorted(identity.scopes), identity.expires_at, identity.sees_all],
            letter.dialect.value,
            letter.epoch,
            letter.last_seq,
            letter.client_address,
            letter.request_id,
            *((trace.traceparent, trace.tracestate) if trace is not None else ()),
        ]
    if isinstance(letter, Said):
        return [name, letter.relay, letter.frame]
    if isinstance(letter, Took):
        return [name, letter.relay, letter.count]
    if isinstance(letter, Sent):
        return [name, letter.relay, letter.payloads]
    return [name, letter.relay, letter.code, letter.reason]


def decode_batch(data: bytes) -> tuple[int, list[Letter]]:
    """The batch's number and its letters. Raises ``UnreadableLetter``."""
    try:
        number, *letters = msgspec.msgpack.decode(data, type=list)
        return int(number), [_letter(*fields) for fields in letters]
    except (msgspec.DecodeError, TypeError, ValueError, KeyError) as error:
        raise UnreadableLetter(f"a batch of letters that cannot be read: {type(error).__name__}") from None


def _letter(name: str, relay: int, *rest: object) -> Letter:
    match name, rest:
        case "m", [str() | bytes() as frame, *_]:
            return Said(relay, frame)
        case "t", [int() as count, *_]:
            return Took(relay, count)
        case "s", [list() as payloads, *_]:
            return Sent(relay, tuple(payloads))
        case "g", [int() as code, str() as reason, *_]:
            return Gone(relay, code, reason)
        case "e", [int() as code, str() as reason, *_]:
            return Ended(relay, code, reason)
        case (
            "o",
            [
                str() as session_id,
                [str() as subject, list() as scopes, expires_at, bool() as sees_all],
                str() as dialect,
                (str() | None) as epoch,
                int() as last_seq,
                str() as client_address,
                str() as request_id,
                *further,
            ],
        ):
            identity = Identity(
                subject=subject,
                scopes=frozenset(scopes),
                expires_at=float(expires_at) if isinstance(expires_at, int | float) else None,
                sees_all=sees_all,
            )
            return Opened(
                relay,
                session_id,
                identity,
                Dialect(dialect),
                epoch,
                last_seq,
                client_address,
                request_id,
                _trace(*further[:2]),
            )
    raise ValueError(name)


def _trace(*fields: object) -> TraceContext | None:
    match fields:
        case [str() as traceparent, str() as tracestate]:
            return TraceContext(traceparent, tracestate)
    return None
