"""What a client may say: each message of the protocol taken as documented, anything else refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.core.client_messages import (
    Ack,
    Attach,
    Authenticate,
    Cancel,
    ClientMessage,
    Detach,
    HitlDecision,
    SwitchAgent,
    ToolResult,
    UserMessage,
    message_id_of,
    parse_client_message,
)
from gateway.core.errors import InvalidMessage


def parse(message: dict[str, Any], *, v2: bool = False) -> ClientMessage:
    """Parse an object as a socket would."""
    return parse_client_message(message, orjson.dumps(message), v2=v2)


def test_a_user_message_is_passed_on_in_its_own_bytes() -> None:
    """Unknown fields and odd spacing included, as long as nothing had to change."""
    raw = b'{"type": "user_message","content":"x","role":"tool","extra":1.50}'
    message = parse_client_message(orjson.loads(raw), raw, v2=False)
    assert message == UserMessage(None, raw)
    assert not message.overtakes


@pytest.mark.parametrize(
    "raw", [b'{"type":"user_message","content":"x"}', b'{ "type":"user_message","content":"x"}']
)
def test_the_default_role_is_made_explicit(raw: bytes) -> None:
    """A message without role goes on as the user's; so does one whose role is null."""
    message = parse_client_message(orjson.loads(raw), raw, v2=False)
    assert isinstance(message, UserMessage)
    assert orjson.loads(message.body) == {"role": "user", "type": "user_message", "content": "x"}
    nulled = parse({"type": "user_message", "content": "x", "role": None})
    assert isinstance(nulled, UserMessage)
    assert orjson.loads(nulled.body)["role"] == "user"


def test_what_continues_work_overtakes_and_what_starts_work_does_not() -> None:
    """Tool results and decisions go first; user messages and agent switches queue."""
    assert isinstance(parse({"type": "switch_agent", "agent_type": "coder"}), SwitchAgent)
    assert not parse({"type": "switch_agent", "agent_type": "coder"}).overtakes  # type: ignore[union-attr]
    result = parse({"type": "tool_result", "call_id": "c", "result": None})
    decision = parse({"type": "hitl_decision", "call_id": "c", "decision": "reject"})
    assert isinstance(result, ToolResult)
    assert isinstance(decision, HitlDecision)
    assert (result.call_id, result.overtakes, decision.overtakes) == ("c", True, True)


@pytest.mark.parametrize("spelled", ["approve", "APPROVE", "Approve"])
def test_a_decision_is_taken_in_any_letter_case_and_passed_on_in_lower(spelled: str) -> None:
    """The Agent Runtime sees one spelling; the rest of the message stays."""
    message = parse({"type": "hitl_decision", "call_id": "c", "decision": spelled, "x": [1]})
    assert isinstance(message, HitlDecision)
    assert message.decision == "approve"
    assert orjson.loads(message.body) == {
        "type": "hitl_decision",
        "call_id": "c",
        "decision": "approve",
        "x": [1],
    }


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({}, "Missing field: type (a string that names the kind of message)."),
        ({"type": 3}, "Missing field: type (a string that names the kind of message)."),
        ({"type": "nope"}, "Unknown message type: nope"),
        ({"type": "n" * 100}, "Unknown message type: " + "n" * 64),
        ({"type": "user_message"}, "Missing field: content (a string)."),
        ({"type": "user_message", "content": 1}, "Field content must be a string."),
        (
            {"type": "user_message", "content": "", "role": "boss"},
            "Field role must be one of user, assistant, system, tool.",
        ),
        (
            {"type": "user_message", "content": "", "role": []},
            "Field role must be one of user, assistant, system, tool.",
        ),
        ({"type": "user_message", "content": "", "agent_type": 1}, "Field agent_type must be a string."),
        ({"type": "switch_agent"}, "Missing field: agent_type (a string)."),
        ({"type": "switch_agent", "agent_type": ""}, "Field agent_type must not be empty."),
        ({"type": "tool_result", "result": 1}, "Missing field: call_id (a string)."),
        (
            {"type": "tool_result", "call_id": "c" * 257, "result": 1},
            "Field call_id is longer than 256 characters.",
        ),
        ({"type": "tool_result", "call_id": "c"}, "Missing field: result (any JSON) or error (a string)."),
        (
            {"type": "tool_result", "call_id": "c", "result": 1, "error": "e"},
            "A tool_result carries result or error, not both.",
        ),
        ({"type": "hitl_decision", "call_id": "c"}, "Missing field: decision (a string)."),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "maybe"},
            "Field decision must be one of approve, edit, reject.",
        ),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "edit"},
            "Missing field: modified_arguments (an object; required for edit).",
        ),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "edit", "modified_arguments": 1},
            "Field modified_arguments must be an object.",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said_by_name(message: dict[str, Any], text: str) -> None:
    """One error that names the field, for clients of both generations alike."""
    for v2 in (False, True):
        with pytest.raises(InvalidMessage) as caught:
            parse({**message, "id": "m"}, v2=v2)
        assert caught.value.message == text


@pytest.mark.parametrize("message_id", [None, "", 5, "i" * 65])
def test_every_v2_message_needs_an_id_of_at_most_64_characters(message_id: object) -> None:
    """Without one it could not be sent again safely; v1 needs none."""
    message = {"type": "user_message", "content": "x", "id": message_id}
    with pytest.raises(InvalidMessage, match=r"Field id|Missing field: id"):
        parse(message, v2=True)
    assert isinstance(parse(message), UserMessage)


def test_each_generation_has_its_own_field_for_the_id() -> None:
    """``id`` is v2's, ``message_id`` v1's; v1 may have a longer one."""
    message = {"type": "user_message", "content": "x", "id": "two", "message_id": "o" * 256}
    assert parse(message, v2=True).message_id == "two"  # type: ignore[union-attr]
    assert parse(message).message_id == "o" * 256  # type: ignore[union-attr]


def test_control_messages_of_v2() -> None:
    """ack, authenticate, attach and detach, each with its own fields."""
    assert parse({"type": "ack", "seq": 7}, v2=True) == Ack(7)
    assert parse({"type": "authenticate", "token": "t"}, v2=True) == Authenticate(None, "t")
    assert parse({"type": "attach", "session_id": "s", "epoch": "e", "last_seq": 3}, v2=True) == Attach(
        "s", "e", 3
    )
    assert parse({"type": "detach", "session_id": "s"}, v2=True) == Detach("s")
    assert parse({"type": "cancel", "id": "c", "turn_id": "t"}, v2=True) == Cancel("c", "t")


@pytest.mark.parametrize("kind", ["ack", "authenticate", "attach", "detach"])
def test_v1_does_not_know_the_control_messages_of_v2(kind: str) -> None:
    """An unknown type is an unknown type."""
    with pytest.raises(InvalidMessage, match=f"Unknown message type: {kind}"):
        parse({"type": kind, "seq": 1, "token": "t", "session_id": "s"})


@pytest.mark.parametrize("seq", [None, -1, 1.5, True, "1"])
def test_an_ack_needs_a_whole_number(seq: object) -> None:
    """Anything else is refused, booleans too."""
    with pytest.raises(InvalidMessage, match="seq must be a whole number"):
        parse({"type": "ack", "seq": seq}, v2=True)


def test_an_invalid_message_is_still_answered_under_its_id() -> None:
    """What can be read of the id is used, whatever else is wrong."""
    assert message_id_of({"id": "a", "message_id": "b"}, v2=True) == "a"
    assert message_id_of({"id": "a", "message_id": "b"}, v2=False) == "b"
    assert message_id_of({"id": 5}, v2=True) is None
    assert message_id_of({"id": "x" * 257}, v2=True) is None


def test_contents_and_tokens_stay_out_of_reprs() -> None:
    """What reaches a log by accident holds no secret."""
    assert "secret" not in repr(parse({"type": "user_message", "content": "secret"}))
    assert "secret" not in repr(parse({"type": "authenticate", "token": "secret"}, v2=True))
