"""Events and answers on the wire, for each dialect."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
import pytest

from gateway.core.delivery import (
    BATCH_BYTES,
    encode_accepted,
    encode_control,
    encode_event,
    encode_events,
    encode_refused,
    encode_v2,
    error_fields,
)
from gateway.core.effects import Accepted, Refused
from gateway.core.errors import AlreadyDecided, NoSuchTurn, RateLimited
from gateway.core.events import Event, EventKind
from gateway.core.websocket_protocol import Dialect

V1, JSON, MSGPACK = Dialect.V1, Dialect.V2_JSON, Dialect.V2_MSGPACK

EVENTS = [
    Event(1, EventKind.V2_ONLY, b'{"type":"turn_started","turn_id":"t"}'),
    Event(2, EventKind.TOKEN, b'{"type":"assistant_message","token":"a","is_final":false}'),
    Event(3, EventKind.TOKEN, b'{"type":"assistant_message","token":"b","is_final":false}'),
    Event(4, EventKind.AGENT, b'{"type":"tool_call","call_id":"c"}'),
    Event(5, EventKind.CANCELLED, b'{"type":"turn_ended","turn_id":"t","outcome":"cancelled"}'),
]


def objects(payloads: list[bytes], dialect: Dialect) -> list[dict[str, Any]]:
    """Payloads decoded, batches taken apart."""
    found = []
    for payload in payloads:
        value = msgspec.msgpack.decode(payload) if dialect is MSGPACK else orjson.loads(payload)
        found += value if isinstance(value, list) else [value]
    return found


def test_v1_sees_one_message_per_payload_and_no_type_of_v2s() -> None:
    """The agent's bytes as they are; a cancelled turn ends in a type that v1 clients know."""
    assert encode_events(EVENTS, V1) == [
        EVENTS[1].data,
        EVENTS[2].data,
        EVENTS[3].data,
        b'{"type":"assistant_message","token":"","is_final":true,"outcome":"cancelled"}',
    ]


@pytest.mark.parametrize("dialect", [JSON, MSGPACK])
def test_v2_sees_every_event_with_its_seq(dialect: Dialect) -> None:
    """In one batch, in either encoding, with no field but ``seq`` added."""
    payloads = encode_events(EVENTS, dialect)
    assert len(payloads) == 1
    assert objects(payloads, dialect) == [{"seq": event.seq, **orjson.loads(event.data)} for event in EVENTS]


@pytest.mark.parametrize("dialect", [V1, JSON, MSGPACK])
def test_one_event_looks_the_same_alone_and_among_others(dialect: Dialect) -> None:
    """The short cut for a token gives the bytes that the long way gives."""
    for event in EVENTS:
        alone = encode_event(event, dialect)
        assert ([] if alone is None else [alone]) == encode_events([event], dialect)


def test_merging_is_for_v2_and_names_the_first_seq() -> None:
    """Adjacent tokens become one with ``first_seq``; v1 gets each."""
    merged = objects(encode_events(EVENTS, JSON, merge=True), JSON)
    assert merged[1] == {
        "first_seq": 2,
        "seq": 3,
        "type": "assistant_message",
        "token": "ab",
        "is_final": False,
    }
    assert [item["seq"] for item in merged] == [1, 3, 4, 5]
    assert len(encode_events(EVENTS, V1, merge=True)) == 4


@pytest.mark.parametrize("dialect", [JSON, MSGPACK])
def test_a_batch_is_closed_at_its_size(dialect: Dialect) -> None:
    """No frame is much larger than BATCH_BYTES, and nothing gets out of order."""
    texts = [b'{"n":%d,"x":"%b"}' % (number, b"x" * 20_000) for number in range(10)]
    frames = encode_v2(texts, dialect)
    assert [item["n"] for item in objects(frames, dialect)] == list(range(10))
    assert len(frames) == 4
    assert all(len(frame) <= BATCH_BYTES + 100 for frame in frames)
    huge = encode_v2([b'{"x":"%b"}' % (b"x" * 2 * BATCH_BYTES)], dialect)
    assert len(huge) == 1


def test_an_accepted_message_is_acked_in_the_words_of_its_generation() -> None:
    """v1 only hears of a message that carried an id; v2 is told the turn and whether it is a repeat."""
    assert encode_accepted(Accepted(None, "t"), V1) is None
    assert orjson.loads(encode_accepted(Accepted("m", "t"), V1) or b"") == {
        "type": "ack",
        "message_id": "m",
        "status": "received",
    }
    assert orjson.loads(encode_accepted(Accepted("m", "t", duplicate=True), JSON) or b"") == {
        "type": "ack",
        "id": "m",
        "status": "duplicate",
        "turn_id": "t",
    }
    assert msgspec.msgpack.decode(encode_accepted(Accepted("m", None), MSGPACK) or b"") == {
        "type": "ack",
        "id": "m",
        "status": "accepted",
    }


def test_a_refused_message_is_an_error_for_v1_and_a_nack_for_v2() -> None:
    """Each with what its client needs to know which message is meant and whether to try again."""
    effect = Refused(AlreadyDecided("Decided."), "m", "c")
    assert orjson.loads(encode_refused(effect, V1)) == {
        "type": "error",
        "error": "Decided.",
        "content": "Decided.",
        "code": "ALREADY_DECIDED",
        "retryable": False,
        "message_id": "m",
        "call_id": "c",
    }
    assert orjson.loads(encode_refused(effect, JSON)) == {
        "type": "nack",
        "id": "m",
        "code": "ALREADY_DECIDED",
        "message": "Decided.",
        "retryable": False,
        "call_id": "c",
    }
    late = Refused(RateLimited("Slow down.", retry_after=2.5))
    assert orjson.loads(encode_refused(late, JSON))["retry_after_s"] == 2.5
    assert "message_id" not in orjson.loads(encode_refused(late, V1))


def test_an_error_says_its_text_twice() -> None:
    """Clients of both generations read one or the other."""
    fields = error_fields(NoSuchTurn("None."))
    assert (fields["error"], fields["content"]) == ("None.", "None.")


def test_control_objects_follow_the_dialect() -> None:
    """Text for v1 and JSON, binary for MessagePack."""
    assert encode_control({"a": 1}, JSON) == b'{"a":1}'
    assert msgspec.msgpack.decode(encode_control({"a": 1}, MSGPACK)) == {"a": 1}
