"""What a run of events says: texts, merged tokens, decided calls."""

from __future__ import annotations

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given

from gateway.core.events import Event, EventKind
from gateway.core.storage import PendingCall
from gateway.core.transcript import answer_text, mark_decided, merge_tokens


def token(seq: int, text: str, extra: str = "") -> Event:
    """A token event."""
    return Event(
        seq,
        EventKind.TOKEN,
        b'{"type":"assistant_message","token":%b,"is_final":false%b}' % (orjson.dumps(text), extra.encode()),
    )


def other(seq: int, kind: EventKind = EventKind.AGENT, **fields: object) -> Event:
    """Any other event."""
    return Event(seq, kind, orjson.dumps(fields))


def test_an_answer_is_all_its_tokens_final_ones_included() -> None:
    """Only ``assistant_message``s count, and only tokens that are text."""
    events = [
        other(1, EventKind.V2_ONLY, type="turn_started", token="no"),
        token(2, "a"),
        other(3, type="plan_update", token="no"),
        other(4, type="assistant_message", token=5),
        other(5, type="assistant_message", token="b", is_final=True),
        other(6, EventKind.CANCELLED, type="turn_ended"),
    ]
    assert answer_text(events) == "ab"


texts = st.text(st.characters(codec="utf-8"), max_size=4)


@given(st.lists(st.one_of(st.tuples(texts, st.sampled_from(["", ',"agent":"x"'])), st.none()), max_size=12))
def test_merging_loses_no_character_and_no_seq(parts: list[tuple[str, str] | None]) -> None:
    """The merged events cover the same seqs in order, and their tokens are the same text."""
    events = [
        other(seq, type="tool_call") if part is None else token(seq, *part)
        for seq, part in enumerate(parts, 1)
    ]
    merged = merge_tokens(events)
    covered = [seq for first_seq, event in merged for seq in range(first_seq, event.seq + 1)]
    assert covered == list(range(1, len(events) + 1))
    for first_seq, event in merged:
        stood_for = events[first_seq - 1 : event.seq]
        fields = orjson.loads(event.data)
        assert fields.pop("token", "") == answer_text(stood_for)
        for one in stood_for:
            before = orjson.loads(one.data)
            before.pop("token", None)
            assert before == fields


def test_adjacent_tokens_become_one_and_what_is_between_keeps_its_place() -> None:
    """A tool call splits the run; a single token stays the very event it was."""
    lone = token(4, "c")
    merged = merge_tokens([token(1, "a"), token(2, "b"), other(3, type="tool_call"), lone])
    assert [(first, event.seq) for first, event in merged] == [(1, 2), (3, 3), (4, 4)]
    assert orjson.loads(merged[0][1].data)["token"] == "ab"
    assert merged[2][1] is lone


@pytest.mark.parametrize(
    ("one", "two"), [("1", "true"), ("1", "1.0"), ("0", "false"), ('"a"', '"b"'), ("[1]", "[1.0]")]
)
def test_tokens_that_differ_in_anything_else_are_not_merged(one: str, two: str) -> None:
    """Not even where the two values are equal to Python."""
    merged = merge_tokens([token(1, "a", f',"x":{one}'), token(2, "b", f',"x":{two}')])
    assert [event.seq for _, event in merged] == [1, 2]


def test_numbers_beside_merged_tokens_keep_their_digits() -> None:
    """No value takes the way over a float."""
    extra = ',"cost":1.10,"id":123456789012345678901234567890'
    ((_, event),) = merge_tokens([token(1, "a", extra), token(2, "b", extra)])
    assert b'"cost":1.10' in event.data
    assert b"123456789012345678901234567890" in event.data


def test_escapes_in_tokens_survive_merging() -> None:
    """Quotes, backslashes and escaped characters arrive as the text they stand for."""
    ((_, event),) = merge_tokens(
        [
            Event(1, EventKind.TOKEN, rb'{"type":"assistant_message","token":"\"\\","is_final":false}'),
            Event(2, EventKind.TOKEN, rb'{"type":"assistant_message","token":"\u00fc\n","is_final":false}'),
        ]
    )
    assert orjson.loads(event.data)["token"] == '"\\ü\n'


def test_a_decided_call_says_so_and_waits_for_no_decision_any_more() -> None:
    """All else stays as the agent sent it."""
    call = PendingCall(
        "c", True, b'{"type":"tool_call","call_id":"c","arguments":{"n":1.10},"requires_approval":true}'
    )
    decided = mark_decided(call, "approve")
    assert not decided.requires_approval
    assert decided.data == call.data[:-1] + b',"decision":"approve"}'
