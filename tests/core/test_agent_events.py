"""Every dialect of the Agent Runtime and every kind of rubbish, read into one form."""

from __future__ import annotations

import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.agent_events import AgentEvent, Skipped, TurnDone, interpret
from gateway.core.events import EventKind
from gateway.core.sse import ServerSentEvent, SseParser


def read(data: bytes | str, name: str = "message") -> AgentEvent | TurnDone | Skipped:
    """What an event with this data means."""
    return interpret(ServerSentEvent(name, data.encode() if isinstance(data, str) else data))


def read_event(data: bytes | str) -> AgentEvent:
    """The same, for data that means an event."""
    event = read(data)
    assert isinstance(event, AgentEvent), event
    return event


def test_a_token_passes_through_as_it_came() -> None:
    """Nothing has to change, so the very bytes are kept: spaces, escapes and all."""
    data = b'{ "type" : "assistant_message", "token": "caf\\u00e9 ", "is_final": false, "cost": 1.50 }'
    event = read_event(data)
    assert event == AgentEvent(EventKind.TOKEN, "assistant_message", data, "café ", False)
    assert event.data is data or event.data == data


def test_null_fields_are_left_out() -> None:
    """Clients of the first generation never see a null field."""
    event = read_event(
        '{"type":"assistant_message","content":null,"token":"a\\u2028","is_final":null,"t":17}'
    )
    assert event.data == '{"type":"assistant_message","token":"a\u2028","t":17}'.encode()
    assert event.kind is EventKind.TOKEN


def test_nested_nulls_are_somebodys_data_and_stay() -> None:
    """``arguments`` and ``metadata`` reach the client as the runtime wrote them."""
    event = read_event(
        '{"type":"tool_call","call_id":"c","x":null,"arguments":{"a": null},"metadata":{"b":null}}'
    )
    assert event.data == b'{"type":"tool_call","call_id":"c","arguments":{"a": null},"metadata":{"b":null}}'


@pytest.mark.parametrize(
    "number",
    [
        "123456789012345678901234567890",
        "-9223372036854775809",
        "1.10",
        "0.1000000000000000055",
        "1e-400",
        "1E2",
    ],
)
@pytest.mark.parametrize("where", ['"n":{}', '"n":[{}]'])
def test_numbers_keep_their_digits_when_a_null_is_left_out(number: str, where: str) -> None:
    """Floats and integers over 64 bit are spliced, never decoded and encoded again."""
    event = read_event('{"type":"x","gone":null,' + where.replace("{}", number) + "}")
    assert event.data == ('{"type":"x",' + where.replace("{}", number) + "}").encode()


def test_a_seq_of_the_runtime_is_left_out() -> None:
    """The sequence number is the gateway's: a second one would overrule it in most decoders."""
    assert read_event('{"type":"x","seq":7,"n":1.5}').data == b'{"type":"x","n":1.5}'
    assert read_event('{"type":"x","first_seq":1}').data == b'{"type":"x"}'
    assert read_event('{"type":"x","s\\u0065q":7}').data == b'{"type":"x"}'


def test_an_object_over_several_data_lines_becomes_one_line() -> None:
    """LF between JSON tokens is white space; the log holds one line per event."""
    assert read_event('\n {"type":"x",\n"a":[1,\r2]} \n').data == b'{"type":"x", "a":[1, 2]}'
    assert read_event('{"type":"x","gone":null,\n"a":[1,\n2]}').data == b'{"type":"x","a":[1, 2]}'


@pytest.mark.parametrize(
    ("text", "kind", "token", "final"),
    [
        ('"token":"a","is_final":false', EventKind.TOKEN, "a", False),
        ('"token":"a"', EventKind.TOKEN, "a", False),
        ('"token":""', EventKind.TOKEN, "", False),
        ('"token":"a","is_final":true', EventKind.AGENT, "a", True),
        ('"is_final":true', EventKind.AGENT, None, True),
        ('"token":null,"content":"all of it"', EventKind.AGENT, None, False),
        ('"token":5', EventKind.AGENT, None, False),
        ('"token":"a","is_final":"true"', EventKind.TOKEN, "a", False),
    ],
)
def test_which_assistant_messages_are_tokens(
    text: str, kind: EventKind, token: str | None, final: bool
) -> None:
    """Only a string token that is not final may be merged with its neighbours."""
    event = read_event('{"type":"assistant_message",' + text + "}")
    assert (event.kind, event.token, event.is_final) == (kind, token, final)


@pytest.mark.parametrize(
    ("text", "call_id", "requires_approval"),
    [
        ('"call_id":"c1","requires_approval":true', "c1", True),
        ('"call_id":"c1"', "c1", False),
        ('"call_id":"c1","requires_approval":null', "c1", False),
        ('"call_id":""', None, False),
        ('"call_id":7', None, False),
        ('"tool_name":"t"', None, False),
    ],
)
def test_what_a_tool_call_says(text: str, call_id: str | None, requires_approval: bool) -> None:
    """The id that an answer must carry, and whether a person decides first."""
    event = read_event('{"type":"tool_call",' + text + "}")
    assert event.kind is EventKind.AGENT
    assert (event.call_id, event.requires_approval) == (call_id, requires_approval)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ('{"status":"completed"}', "done"),
        ("", "done"),
        ("rubbish", "done"),
        ("[DONE]", "message"),
        (" [DONE] ", "message"),
        ('{"type":"done","usage":{"tokens":3}}', "message"),
    ],
)
def test_every_way_to_say_done(data: str, name: str) -> None:
    """``event: done`` with anything, ``[DONE]``, and a type ``done`` end the turn."""
    assert read(data, name) == TurnDone()
    assert isinstance(read(data, name), TurnDone)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_json"),
        (b"hello", "not_json"),
        (b'{"type":"x"', "not_json"),
        (b'{"type":"x","n":NaN}', "not_json"),
        (b'{"type":"x","n":Infinity}', "not_json"),
        (b'{"type":"x","n":1e999}', "not_json"),
        (b'{"type":"\xff"}', "not_json"),
        (b'{"type":"x","a":' + b"[" * 128 + b"]" * 128 + b"}", "not_json"),
        (b'{"type":"x","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not_json"),
        (b"[1]", "not_object"),
        (b'"x"', "not_object"),
        (b"null", "not_object"),
        (b"3", "not_object"),
        (b"{}", "no_type"),
        (b'{"type":null}', "no_type"),
        (b'{"type":""}', "no_type"),
        (b'{"type":["x"]}', "no_type"),
        (b'{"token":"a"}', "no_type"),
    ],
)
def test_what_cannot_be_shown_is_skipped(data: bytes, reason: str) -> None:
    """Each kind of rubbish has its reason, and none raises."""
    assert read(data) == Skipped(reason)  # type: ignore[arg-type]
    assert isinstance(read(data), Skipped)


def test_the_deepest_event_that_passes_can_be_written_by_every_encoder() -> None:
    """127 levels inside the object pass, and orjson can encode what it decoded."""
    event = read_event(b'{"type":"x","a":' + b"[" * 127 + b"]" * 127 + b"}")
    orjson.dumps(orjson.loads(event.data))


def test_many_brackets_in_a_text_are_not_depth() -> None:
    """A token full of brackets is a flat event."""
    assert read_event('{"type":"assistant_message","token":"' + "[{" * 500 + '"}').kind is EventKind.TOKEN


def test_an_event_name_does_not_stand_in_for_a_type() -> None:
    """Without ``type`` an event is skipped, whatever ``event:`` says; with one, the name does not matter."""
    assert read('{"plan":[]}', "plan_update") == Skipped("no_type")
    named = read('{"type":"plan_update"}', "something")
    assert isinstance(named, AgentEvent)
    assert named.type == "plan_update"


@pytest.mark.parametrize(
    ("escaped", "kept"),
    [
        ("\\ud83d\\ude00", "\\ud83d\\ude00"),
        ("\\uD83D", "\\ufffd"),
        ("\\ude00\\ud83d", "\\ufffd\\ufffd"),
        ("\\\\ud83d\\udead", "\\\\ud83d\\ufffd"),
        ("\\\\\\ud83d", "\\\\\\ufffd"),
    ],
)
def test_half_a_character_is_replaced(escaped: str, kept: str) -> None:
    """A runtime that cuts a surrogate pair in two loses that character, not the event."""
    event = read_event('{"type":"assistant_message","token":"' + escaped + '"}')
    assert event.data == ('{"type":"assistant_message","token":"' + kept + '"}').encode()
    assert event.token == json.loads(f'"{kept}"')


def test_agent_switched_fields_are_lifted_out_of_metadata() -> None:
    """Clients look at the top level; ``metadata`` stays as it was."""
    event = read_event(
        '{"type":"agent_switched","to_agent":"coder","reason":null,'
        '"metadata":{"from_agent":"orchestrator","to_agent":"other","reason":"r","confidence":0.90,"more":null}}'
    )
    assert event.data == (
        b'{"type":"agent_switched","to_agent":"coder","reason":"r",'
        b'"metadata":{"from_agent":"orchestrator","to_agent":"other","reason":"r","confidence":0.90,"more":null},'
        b'"from_agent":"orchestrator","confidence":0.90}'
    )


@pytest.mark.parametrize("metadata", ["", ',"metadata":{}', ',"metadata":{"reason":null}', ',"metadata":[1]'])
def test_agent_switched_with_nothing_to_lift_passes_through(metadata: str) -> None:
    """Flat events keep their bytes."""
    data = ('{"type":"agent_switched",  "to_agent":"coder"' + metadata + "}").encode()
    assert read_event(data).data == data


@pytest.mark.parametrize(
    ("given_fields", "text"),
    [
        ({"error": "boom"}, "boom"),
        ({"content": "boom"}, "boom"),
        ({"error": "boom", "content": "other"}, "boom"),
        ({"error": None, "content": "boom"}, "boom"),
        ({"error": {"message": "boom"}}, "boom"),
        ({"message": "boom"}, "boom"),
        ({"error": {"x": 1}, "content": ""}, "The agent reported an error without saying which."),
        ({}, "The agent reported an error without saying which."),
    ],
)
def test_errors_carry_one_text_under_both_names(given_fields: dict[str, Any], text: str) -> None:
    """Clients of both generations read it, with a code and whether to retry."""
    event = read_event(json.dumps({"type": "error", **given_fields, "call_id": "c"}))
    shown = {
        "type": "error",
        "error": text,
        "content": text,
        "code": "AGENT_ERROR",
        "retryable": False,
        "call_id": "c",
    }
    message = {"message": "boom"} if "message" in given_fields else {}
    assert orjson.loads(event.data) == shown | message
    assert event.kind is EventKind.AGENT


def test_a_complete_error_passes_through() -> None:
    """Code and retryable of the runtime are kept, and so are the bytes."""
    data = b'{"type":"error", "error":"e", "content":"e", "code":"MODEL_BUSY", "retryable":true}'
    assert read_event(data).data == data


@pytest.mark.parametrize(("code", "retryable"), [("7", '"yes"'), ('""', "1"), ("null", "null"), ("[1]", "0")])
def test_a_code_or_retryable_of_the_wrong_type_is_replaced(code: str, retryable: str) -> None:
    """Programs read these two: they are always a string and a boolean."""
    shown = orjson.loads(
        read_event(f'{{"type":"error","error":"e","code":{code},"retryable":{retryable}}}').data
    )
    assert (shown["code"], shown["retryable"]) == ("AGENT_ERROR", False)
    assert type(shown["retryable"]) is bool


def test_retained_events_do_not_pin_encoder_buffers() -> None:
    """20 000 short events whose nulls were left out take less than 1 KB each.

    A retained result of ``orjson.dumps`` pins its 4 KB buffer, which only resident memory shows.
    """

    def resident_kb() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4

    source = ServerSentEvent("message", b'{"type":"assistant_message","content":null,"token":"a"}')
    before = resident_kb()
    retained = [interpret(source) for _ in range(20_000)]
    assert resident_kb() - before < 20_000
    assert len(retained) == 20_000


def test_duplicate_names_are_harmless() -> None:
    """The last one counts for the gateway, and the event does not break."""
    event = read_event('{"type":"error","type":"assistant_message","token":null,"token":"a"}')
    assert (event.type, event.token) == ("assistant_message", "a")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "token",
        "is_final",
        "metadata",
        "from_agent",
        "error",
        "content",
        "code",
        "retryable",
        "seq",
        "x",
        'q"\\',
    ]
)
TYPES = st.sampled_from(
    ["assistant_message", "tool_call", "agent_switched", "error", "plan_update", "\u2028"]
)


@given(TYPES, st.dictionaries(NAMES, JSON_VALUES, max_size=6), st.booleans(), st.sampled_from([None, 1]))
@example("assistant_message", {"token": "\ud83d"}, True, None)
def test_any_object_with_a_type_becomes_one_clean_line(
    type_: str, fields: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    """All that was not null and not ``seq`` is there with its value, on one line for strict decoders."""
    original = {"type": type_, **fields}
    text = json.dumps(original, ensure_ascii=ascii_only, indent=indent)
    event = read(text.encode())
    if isinstance(event, Skipped):
        assert any(abs(number) > 1e308 for number in _numbers(original))  # an integer beyond a double
        return
    assert isinstance(event, AgentEvent)
    assert event.data.startswith(b"{")
    assert not set(event.data) & {0x0A, 0x0D}
    orjson.loads(event.data)
    shown = json.loads(event.data)
    assert "seq" not in shown
    assert None not in shown.values()
    changed = {"error", "content", "code", "retryable", "from_agent", "seq"}
    expected = {k: v for k, v in original.items() if v is not None and k not in changed}
    if "\ufffd" not in json.dumps(shown, ensure_ascii=False):
        assert {k: v for k, v in shown.items() if k not in changed} == expected


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@given(st.binary(max_size=80), st.sampled_from(["message", "done", "x"]))
def test_no_bytes_whatever_raise(data: bytes, name: str) -> None:
    """An upstream that sends rubbish is counted, not crashed on."""
    read(data, name)


DIALECTS = {
    "named events ended by done": (
        b': ping\n\nevent: message\ndata: {"type":"assistant_message","token":"a"}\n\n'
        b'event: message\ndata: {"type":"assistant_message","token":"","is_final":true}\n\n'
        b'event: done\ndata: {"status":"completed"}\n\n'
    ),
    "bare data ended by the stream": (
        b'data: {"type":"assistant_message","token":"a"}\r\n\r\n'
        b'data: {"type":"assistant_message",\r\ndata: "token":"","is_final":true}\r\n\r\n'
    ),
    "bare data ended by a type": (
        b'data:{"type":"assistant_message","token":"a","content":null}\r\r'
        b'data:{"type":"assistant_message","token":"","is_final":true}\r\rdata:{"type":"done"}\r\r'
    ),
    "bare data ended by [DONE]": (
        b'\xef\xbb\xbfid: 1\ndata: {"type":"assistant_message","token":"a"}\n\n'
        b'id: 2\ndata: {"type":"assistant_message","token":"","is_final":true}\n\ndata: [DONE]\n\n'
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@given(places=st.lists(st.integers(0, 300), max_size=8))
def test_every_dialect_cut_anywhere_says_the_same(dialect: str, places: list[int]) -> None:
    """One token, one final message, and the end where the dialect has one."""
    stream, parser = DIALECTS[dialect], SseParser(1 << 20)
    edges = [0, *sorted({place % len(stream) for place in places}), len(stream)]
    chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
    meanings = [interpret(event) for chunk in chunks for event in parser.feed(chunk)]
    events = [meaning for meaning in meanings if isinstance(meaning, AgentEvent)]
    assert [(event.kind, event.token) for event in events] == [(EventKind.TOKEN, "a"), (EventKind.AGENT, "")]
    dones = [meaning for meaning in meanings if isinstance(meaning, TurnDone)]
    assert len(dones) == (0 if dialect == "bare data ended by the stream" else 1)
    assert len(events) + len(dones) == len(meanings)
