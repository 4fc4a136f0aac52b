"""What a message would take, told before it is decoded: floods are refused, what people send is not."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress

import hypothesis.strategies as st
import msgspec
import orjson
import pytest
from hypothesis import given

from gateway.core.codec import MAX_MESSAGES, decode_json, decode_json_frame, decode_msgpack_frame
from gateway.core.errors import InvalidMessage
from gateway.core.structure import (
    is_nested_deeper,
    messagepack_takes_too_much,
    outside_strings,
    takes_too_much,
)

MAX_MESSAGE_BYTES = 2**20
UNITS = (
    "[]",
    "{}",
    "[1]",
    '{"a":1}',
    '{"%06x":1}',
    '"%06x"',
    '"ab"',
    "999",
    "1.5",
    "null",
    '[[[["a"]]]]',
    '{"line":1,"col":2}',
    "[" * 60 + "]" * 60,
    '{"a":' * 30 + "[" * 30 + "]" * 30 + "}" * 30,
)


def filled(unit: str, size: int, opening: str = "[", closing: str = "]", padding: int = 0) -> bytes:
    """A message of about ``size`` bytes made of ``unit``s, and ``padding`` bytes of text."""
    count = size // (len(unit) + 1)
    units = (unit % number if "%" in unit else unit for number in range(count))
    message = f'{{"type":"tool_result","call_id":"c","pad":"{" " * padding}","result":{opening}'
    return f"{message}{','.join(units)}{closing}}}".encode()


def peak_of_decoding(data: bytes) -> int:
    """Bytes that decoding takes at most, refused or not, beside the message itself."""
    tracemalloc.start()
    with suppress(InvalidMessage):
        decode_json_frame(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
def test_no_message_takes_ten_times_the_largest_message(unit: str, share: float) -> None:
    """Whether it is refused or just still taken, and whatever the rest of it is."""
    size = int(MAX_MESSAGE_BYTES * share)
    assert peak_of_decoding(filled(unit, size, padding=MAX_MESSAGE_BYTES - size)) <= 10 * MAX_MESSAGE_BYTES


def test_an_object_of_very_many_members_takes_no_more() -> None:
    """Its keys are all different, or it would be refused for that."""
    for share in (0.3, 0.6, 1.0):
        message = filled('"%06x":1', int(MAX_MESSAGE_BYTES * share), "{", "}")
        assert peak_of_decoding(message) <= 10 * MAX_MESSAGE_BYTES


@pytest.mark.parametrize("byte", [b"\x80", b"\x90", b"\x01", b"\xa0", b"\xc0"])
def test_no_messagepack_takes_ten_times_the_largest_message(byte: bytes) -> None:
    """One byte makes an empty map there."""
    count = MAX_MESSAGE_BYTES - 64
    data = b"\x82\xa4type\xa1x\xa1a\xdd" + count.to_bytes(4, "big") + byte * count
    tracemalloc.start()
    try:
        with pytest.raises(InvalidMessage, match="too many values"):
            decode_msgpack_frame(data)
        assert tracemalloc.get_traced_memory()[1] <= MAX_MESSAGE_BYTES
    finally:
        tracemalloc.stop()


def test_what_tools_answer_is_taken() -> None:
    """A megabyte of search results, of source text that is full of brackets, and of numbers."""
    found = '{"file":"src/module_%06x.py","line":123,"text":"    return self.that(is_long)"}'
    decode_json(filled(found, 10**6))
    source = orjson.dumps({"content": '{"a": [1, {"b": "c\\n"}], \'d\': [[],[],{}]},\n' * 20_000})
    decode_json(source)
    decode_json(filled("0.12345678", 10**6))
    rows = [{"path": f"src/module_{number}.py", "line": number, "ok": True} for number in range(10_000)]
    assert decode_msgpack_frame(msgspec.msgpack.encode({"type": "x", "result": rows}))


def test_a_frame_holds_a_bounded_number_of_messages() -> None:
    """Each has an answer of its own, so a frame of very many tiny ones is refused whole."""
    message = '{"type":"cancel","id":"x"}'
    assert len(decode_json_frame(f"[{','.join([message] * MAX_MESSAGES)}]")) == MAX_MESSAGES
    with pytest.raises(InvalidMessage, match="at most"):
        decode_json_frame(f"[{','.join([message] * (MAX_MESSAGES + 1))}]")
    with pytest.raises(InvalidMessage, match="at most"):
        decode_msgpack_frame(msgspec.msgpack.encode([{"type": "cancel"}] * (MAX_MESSAGES + 1)))


texts = st.text(st.sampled_from('ab"\\{}[]:,é\n'), max_size=12)
values = st.recursive(
    st.none() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def depth_of(value: object) -> int:
    """How deep containers nest."""
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def keys_of(value: object) -> int:
    """How many members all objects have together."""
    if isinstance(value, dict):
        return len(value) + sum(map(keys_of, value.values()))
    return sum(map(keys_of, value)) if isinstance(value, list) else 0


@given(values, st.integers(0, 6), st.booleans())
def test_structure_is_told_from_strings(value: object, limit: int, is_long: bool) -> None:
    """Whatever strings hold, also where a text is looked at in chunks."""
    text = orjson.dumps([value, '"{[:,]}' * 4_700] if is_long else [value])
    assert outside_strings(text).count(b":") == keys_of(value)
    assert is_nested_deeper(text, limit) == (1 + depth_of(value) > limit)


@pytest.mark.parametrize("shift", range(24))
def test_chunks_may_end_anywhere(shift: int) -> None:
    """Within a string, beside a quote, within an escape."""
    text = orjson.dumps([" " * (2**16 - 12 + shift - 2), 'a"\\"\\\\', {"k": "{["}, "end"])
    assert outside_strings(text) == b"[,,{:},]"


@given(st.binary(max_size=40))
def test_anything_may_come(data: bytes) -> None:
    """What is no JSON and no MessagePack is for the decoders to say."""
    takes_too_much(data * 4_000)
    messagepack_takes_too_much(data * 4_000)
    is_nested_deeper(data, 3)
    outside_strings(data * 4_000)
