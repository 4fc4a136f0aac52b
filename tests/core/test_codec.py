"""The strict decoder and the encoders: what is taken, what is refused, what keeps its bytes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import msgspec
import orjson
import pytest
from hypothesis import given

from gateway.core.codec import (
    MAX_DEPTH,
    decode_event_frame,
    decode_json,
    decode_json_frame,
    decode_json_object,
    decode_msgpack_frame,
    encode_json,
    json_to_msgpack,
    replace_field,
    split_batch,
)
from gateway.core.errors import InvalidMessage
from gateway.core.structure import is_nested_deeper

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(codec="utf-8"), max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":1e999}',
        '{"a":"\\ud800"}',
        '{"a":"\ud800"}',
        '{"a":1,"a":2}',
        '{"x":{"a":1,"b":2,"a":3}}',
        '{"a":1}x',
        '{"a":01}',
        "\ufeff{}",
        '{"a":"\n"}',
        b'{"a":"\xff"}',
    ],
)
def test_what_is_not_strict_json_is_refused_by_a_text_that_says_so(text: str | bytes) -> None:
    """Every refusal begins as the protocol promises, and never quotes more than a line."""
    with pytest.raises(InvalidMessage, match=r"^Invalid JSON message") as caught:
        decode_json(text)
    assert "\n" not in caught.value.message


@given(json_values)
def test_every_json_value_is_decoded_as_it_is(value: object) -> None:
    """Strictness refuses no valid text."""
    assert decode_json(orjson.dumps(value)) == value


@pytest.mark.parametrize(
    ("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ('{"a":[', "]}")]
)
def test_nesting_is_bounded_whatever_brackets_it_is_made_of(opening: str, closing: str) -> None:
    """MAX_DEPTH levels are taken and one more is not, for arrays, objects and both by turns."""
    per_round = opening.count("[") + opening.count("{")
    rounds = MAX_DEPTH // per_round
    text = f"{opening * rounds}1{closing * rounds}"
    decode_json(text)
    with pytest.raises(InvalidMessage, match="nested deeper"):
        decode_json(f"[{text}]")


def test_brackets_side_by_side_or_inside_strings_are_not_depth() -> None:
    """A wide value is not deep, nor is a string of brackets."""
    decode_json("[" + ",".join(["[]"] * 1000) + "]")
    decode_json('["' + "[" * 1000 + '", "\\"' + "{" * 1000 + '"]')
    assert is_nested_deeper(b"[[[]]]", 2)
    assert not is_nested_deeper(b"[[[]]]", 3)


def test_a_bracket_bomb_never_reaches_a_recursive_parser() -> None:
    """A megabyte of openers is refused for its depth, not by a crash."""
    for openers in (1_000_000, 50_000, 500):
        with pytest.raises(InvalidMessage, match=r"nested deeper|too many values"):
            decode_json("[" * openers)


def test_an_object_is_asked_for() -> None:
    """Any other value is no message."""
    assert decode_json_object('{"a":1}') == {"a": 1}
    for text in ("[]", "1", "null", '"x"'):
        with pytest.raises(InvalidMessage, match=r"^Invalid JSON message"):
            decode_json_object(text)


def test_a_frame_gives_each_object_with_its_own_bytes() -> None:
    """One object or an array of them; numbers and spacing inside an object stay as sent."""
    assert decode_json_frame(' {"a": 1.0} ') == [({"a": 1.0}, b'{"a": 1.0}')]
    pairs = decode_json_frame('[ {"a":1.50} , {"b": 123456789012345678901234567890} ]')
    assert [raw for _, raw in pairs] == [b'{"a":1.50}', b'{"b": 123456789012345678901234567890}']


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"a":1},2]', "1"])
def test_a_frame_of_anything_but_objects_is_refused(text: str) -> None:
    """An empty batch says nothing, so it is an error too."""
    with pytest.raises(InvalidMessage, match="non-empty array of objects"):
        decode_json_frame(text)


def test_messagepack_carries_the_same_objects() -> None:
    """A MessagePack frame decodes to the same pairs as its JSON twin."""
    value = [{"type": "x", "n": 2**63, "f": 0.5, "s": "ü", "l": [None, True]}, {"b": {}}]
    assert decode_msgpack_frame(msgspec.msgpack.encode(value)) == decode_json_frame(encode_json(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"a": b"bytes"}),
        msgspec.msgpack.encode({1: "x"}),
        msgspec.msgpack.encode({"a": math.nan}),
        msgspec.msgpack.encode({"a": msgspec.msgpack.Ext(5, b"x")}),
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode({"a": 1}) + b"\x00",
        b"\x81\xa1a\xa1\xff",
        b"\x91" * 100_000,
    ],
)
def test_what_json_cannot_say_is_refused_in_messagepack(data: bytes) -> None:
    """Binary, extensions, NaN, other keys, broken text, excess bytes: one typed error."""
    with pytest.raises(InvalidMessage, match=r"^Invalid (MessagePack|JSON) message"):
        decode_msgpack_frame(data)


def test_encoding_keeps_integers_that_do_not_fit_64_bits() -> None:
    """Where the fast encoder refuses, the slow one takes over."""
    assert encode_json({"n": 2**80}) == b'{"n":1208925819614629174706176}'


def test_what_is_encoded_does_not_pin_its_encoder_buffer() -> None:
    """A retained result is its own exact object: orjson's would pin 4 KB each."""
    kept = [encode_json({"n": number}) for number in range(2)]
    assert all(type(item) is bytes for item in kept)
    assert encode_json({"n": 1}) is not encode_json({"n": 1})


def test_replacing_a_field_touches_no_other_byte_of_a_value() -> None:
    """Numbers keep their digits, and the order of the fields stays."""
    data = b'{"n": 1.10, "decision": "APPROVE", "big": 123456789012345678901234567890}'
    assert replace_field(data, "decision", "approve") == (
        b'{"n":1.10,"decision":"approve","big":123456789012345678901234567890}'
    )


def test_json_becomes_messagepack_of_the_same_value() -> None:
    """What goes out in binary is what would have gone out as text."""
    assert msgspec.msgpack.decode(json_to_msgpack('{"a":[1,"ü",null]}'.encode())) == {"a": [1, "ü", None]}


def test_a_client_decodes_frames_of_either_encoding() -> None:
    """Text is JSON and bytes are MessagePack; one object or a batch."""
    assert decode_event_frame('{"a":1}') == [{"a": 1}]
    assert decode_event_frame(msgspec.msgpack.encode([{"a": 1}, {"b": 2}])) == [{"a": 1}, {"b": 2}]
    for bad in ("[", "[]", "[1]", "1", b"\xc1"):
        with pytest.raises(InvalidMessage, match="The gateway sent"):
            decode_event_frame(bad)


def test_a_batch_is_split_into_its_very_bytes() -> None:
    """Each value as it stands: digits, spaces inside and brackets in texts included."""
    values = [b'{"seq":1,"token":"a],["}', b'{"n": 1.10}', b"{}"]

    assert split_batch(b"[" + b",".join(values) + b"]") == values
