"""How session events and answers look on the wire, for each dialect. One payload is one data frame."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.core.codec import encode_json, json_to_msgpack
from gateway.core.effects import Accepted, Refused
from gateway.core.errors import GatewayError
from gateway.core.events import Event, EventKind
from gateway.core.transcript import merge_tokens
from gateway.core.websocket_protocol import Dialect

BATCH_BYTES = 64 << 10
"""A v2 batch is closed at this size, so that one frame never holds a connection for long."""

_V1_CANCELLED = b'{"type":"assistant_message","token":"","is_final":true,"outcome":"cancelled"}'
"""What ends a cancelled answer for v1: a type that its clients know, so that their spinner stops."""


def encode_events(events: Sequence[Event], dialect: Dialect, *, merge: bool = False) -> list[bytes]:
    """The payloads that carry ``events`` to a socket; v1 may need fewer than there are events.

    ``merge`` joins adjacent tokens (v2 only: v1 has no ``first_seq``, and its clients count on each token).
    """
    if dialect is Dialect.V1:
        return [payload for event in events if (payload := _v1(event)) is not None]
    if merge:
        texts = [_v2(first_seq, event) for first_seq, event in merge_tokens(events)]
    else:
        texts = [b'{"seq":%d,%b' % (event.seq, event.data[1:]) for event in events]
    return encode_v2(texts, dialect)


def encode_event(event: Event, dialect: Dialect) -> bytes | None:
    """The payload of one event, or None when v1 does not see it: a token that goes out as it comes."""
    if dialect is Dialect.V1:
        return event.data if event.kind <= EventKind.AGENT else _v1(event)
    data = b'{"seq":%d,%b' % (event.seq, event.data[1:])
    return data if dialect is Dialect.V2_JSON else json_to_msgpack(data)


def encode_v2(texts: Sequence[bytes], dialect: Dialect) -> list[bytes]:
    """JSON objects as v2 frames: batched up to ``BATCH_BYTES``, in the dialect's encoding."""
    frames: list[bytes] = []
    batch: list[bytes] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_BYTES:
            frames.append(_frame(batch))
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        frames.append(_frame(batch))
    if dialect is Dialect.V2_MSGPACK:
        return [json_to_msgpack(frame) for frame in frames]
    return frames


def encode_control(fields: dict[str, object], dialect: Dialect) -> bytes:
    """One object outside the log (welcome, ack, …) as a payload."""
    data = encode_json(fields)
    return json_to_msgpack(data) if dialect is Dialect.V2_MSGPACK else data


def encode_accepted(effect: Accepted, dialect: Dialect) -> bytes | None:
    """The answer to an accepted message; None when v1 did not ask for one."""
    if dialect is Dialect.V1:
        if effect.message_id is None:
            return None
        return encode_json({"type": "ack", "message_id": effect.message_id, "status": "received"})
    answer: dict[str, object] = {
        "type": "ack",
        "id": effect.message_id,
        "status": "duplicate" if effect.duplicate else "accepted",
    }
    if effect.turn_id is not None:
        answer["turn_id"] = effect.turn_id
    return encode_control(answer, dialect)


def encode_refused(effect: Refused, dialect: Dialect) -> bytes:
    """The answer to a message that was not taken: ``error`` for v1, ``nack`` for v2."""
    if dialect is not Dialect.V1:
        return encode_control(nack_fields(effect), dialect)
    fields = error_fields(effect.error)
    if effect.message_id is not None:
        fields["message_id"] = effect.message_id
    if effect.call_id is not None:
        fields["call_id"] = effect.call_id
    return encode_control(fields, dialect)


def nack_fields(effect: Refused) -> dict[str, object]:
    """A ``nack``."""
    error = effect.error
    fields: dict[str, object] = {
        "type": "nack",
        "id": effect.message_id,
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
    }
    if error.retry_after is not None:
        fields["retry_after_s"] = error.retry_after
    if effect.call_id is not None:
        fields["call_id"] = effect.call_id
    return fields


def error_fields(error: GatewayError) -> dict[str, object]:
    """An ``error`` event: ``error`` and ``content`` say the same, for clients of both generations."""
    return {
        "type": "error",
        "error": error.message,
        "content": error.message,
        "code": error.code,
        "retryable": error.retryable,
    }


def _v1(event: Event) -> bytes | None:
    if event.kind is EventKind.CANCELLED:
        return _V1_CANCELLED
    return None if event.kind is EventKind.V2_ONLY else event.data


def _v2(first_seq: int, event: Event) -> bytes:
    if first_seq == event.seq:
        return b'{"seq":%d,%b' % (event.seq, event.data[1:])
    return b'{"first_seq":%d,"seq":%d,%b' % (first_seq, event.seq, event.data[1:])


def _frame(batch: list[bytes]) -> bytes:
    return batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"
