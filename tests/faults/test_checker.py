"""The checker finds each kind of broken promise in a record that keeps all promises otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from attrs import Factory, define

from tests.faults.agent_runtime import Execution, Post
from tests.faults.checker import check_session
from tests.faults.records import ClientRecord, Entry, Sent, SessionRecord
from tests.faults.violations import Violation


def token(mark: str, text: str = "a") -> dict[str, Any]:
    """A token event as the runtime emits it."""
    return {"type": "assistant_message", "token": f"⟦{mark}⟧{text}", "is_final": False}


ASK = {"type": "user_message", "content": "x", "id": "m1", "plan": {}}
DECIDE = {"type": "hitl_decision", "call_id": "c", "decision": "reject", "id": "m2"}
CALL = {"type": "tool_call", "call_id": "c", "requires_approval": True, "mark": "⟦0.2⟧"}
END = {"type": "assistant_message", "token": "", "is_final": True, "mark": "⟦1.1⟧"}
EVENTS: list[dict[str, Any]] = [
    {"seq": 1, "type": "turn_started", "turn_id": "t1", "id": "m1"},
    {"seq": 2, **token("0.0")},
    {"seq": 3, **token("0.1", "b")},
    {"seq": 4, **CALL},
    {"seq": 5, "type": "turn_ended", "turn_id": "t1", "outcome": "completed", "last_seq": 4},
    {"seq": 6, "type": "approval_resolved", "call_id": "c", "decision": "reject"},
    {"seq": 7, "type": "turn_started", "turn_id": "t2", "id": "m2"},
    {"seq": 8, **token("1.0")},
    {"seq": 9, **END},
    {"seq": 10, "type": "turn_ended", "turn_id": "t2", "outcome": "completed", "last_seq": 9},
]
MERGED = {"first_seq": 2, "seq": 3, "type": "assistant_message", "token": "⟦0.0⟧a⟦0.1⟧b", "is_final": False}


def welcome(last_seq: int, *, resumed: bool) -> dict[str, Any]:
    """What a v2 client is told first."""
    turn = {"id": "t1", "state": "running"} if last_seq == 4 else {"id": None, "state": "idle"}
    return {
        "type": "welcome",
        "epoch": "e",
        "last_seq": last_seq,
        "resumed": resumed,
        "turn": turn,
        "pending": [],
    }


def accepted(message_id: str, turn_id: str) -> dict[str, Any]:
    """The answer to a v2 message."""
    return {"type": "ack", "id": message_id, "status": "accepted", "turn_id": turn_id}


@define
class Record:
    """Everything that the checker is given."""

    session: SessionRecord
    posts: list[Post]
    executions: list[Execution] = Factory(list)

    def client(self, name: str) -> ClientRecord:
        """One of the clients."""
        return next(client for client in self.session.clients if client.name == name)

    def check(self) -> list[Violation]:
        """What the checker says."""
        return check_session(self.session, self.posts, self.executions)[0]


def perfect() -> Record:
    """Two v2 clients, one of which was cut, and a v1 client, through two turns and a decision."""
    first = ClientRecord("one", "json", sent={"m1": Sent(ASK, 1, [accepted("m1", "t1")])})
    first.entries = [Entry("connect", None), Entry("got", welcome(0, resumed=False))]
    first.entries += [Entry("got", copy.deepcopy(event)) for event in EVENTS]
    nack = {"type": "nack", "id": "m3", "code": "ALREADY_DECIDED", "retryable": False}
    late = {**DECIDE, "decision": "approve", "id": "m3"}
    first.sent["m3"] = Sent(late, 1, [nack])
    second = ClientRecord("two", "msgpack", sent={"m2": Sent(DECIDE, 2, [accepted("m2", "t2")])})
    second.entries = [Entry("connect", None), Entry("got", welcome(0, resumed=False))]
    second.entries += [Entry("got", copy.deepcopy(EVENTS[0])), Entry("lost", "cut")]
    second.entries += [Entry("connect", ("e", 1)), Entry("got", welcome(4, resumed=True))]
    second.entries += [Entry("got", copy.deepcopy(event)) for event in (MERGED, *EVENTS[3:])]
    third = ClientRecord("three", "v1", entries=[Entry("connect", None)])
    for event in EVENTS:
        if event["type"] not in ("turn_started", "turn_ended", "approval_resolved"):
            third.entries.append(Entry("got", {k: v for k, v in event.items() if k != "seq"}))
    works = [
        Execution(0, "r-1", "t1", [token("0.0"), token("0.1", "b"), CALL]),
        Execution(1, "r-1", "t2", [token("1.0"), END]),
    ]
    for work in works:
        work.finished, work.revealed = True, len(work.events)
    return Record(
        SessionRecord("r-1", [first, second, third], copy.deepcopy(EVENTS), final=welcome(10, resumed=True)),
        [
            Post("r-1", "t1", None, {"role": "user", **ASK}, 1.0, 0),
            Post("r-1", "t2", None, dict(DECIDE), 2.0, 1),
        ],
        works,
    )


def entry_with_seq(client: ClientRecord, seq: int) -> int:
    """Where a client got the event of that seq."""
    return next(
        index
        for index, (kind, value) in enumerate(client.entries)
        if kind == "got" and value["type"] != "welcome" and value.get("seq") == seq
    )


def drop_event(record: Record) -> None:
    """A client misses an event."""
    client = record.client("one")
    del client.entries[entry_with_seq(client, 8)]


def repeat_event(record: Record) -> None:
    """A client gets an event twice."""
    client = record.client("one")
    index = entry_with_seq(client, 8)
    client.entries.insert(index, client.entries[index])


def swap_events(record: Record) -> None:
    """A client gets two events in the wrong order."""
    entries = record.client("one").entries
    index = entry_with_seq(record.client("one"), 8)
    entries[index], entries[index + 1] = entries[index + 1], entries[index]


def change_event(record: Record) -> None:
    """The same seq stands for something else."""
    client = record.client("one")
    client.entries[entry_with_seq(client, 8)].value["token"] = "⟦1.0⟧z"


def resume_too_late(record: Record) -> None:
    """What a client missed is not sent when it resumes."""
    client = record.client("two")
    del client.entries[entry_with_seq(client, 3)]


def resume_without_word(record: Record) -> None:
    """A client is not resumed and gets no snapshot."""
    client = record.client("two")
    client.entries[5].value["resumed"] = False


def lose_token_in_merge(record: Record) -> None:
    """Merged tokens are not all that they stand for."""
    client = record.client("two")
    client.entries[entry_with_seq(client, 3)].value["token"] = "⟦0.0⟧a"


def needless_snapshot(record: Record) -> None:
    """A snapshot stands for events that the gateway had stored."""
    snapshot = {**welcome(10, resumed=False), "type": "snapshot", "reason": "trimmed", "seq": 10, "text": ""}
    client = record.client("two")
    client.entries[5].value["resumed"] = False
    client.entries[6:] = [Entry("got", snapshot)]


def stay_behind(record: Record) -> None:
    """A client never gets the end."""
    record.client("one").entries.pop()


def lose_the_end(record: Record) -> None:
    """Everybody misses what the runtime emitted last."""
    for events in (record.session.audit,):
        del events[8]
        events[8] = {**events[8], "seq": 9, "last_seq": 8}
    record.session.clients.clear()


def event_after_end(record: Record) -> None:
    """An event follows its turn's end."""
    events = record.session.audit
    events[8], events[9] = {**events[9], "seq": 9, "last_seq": 8}, {**events[8], "seq": 10}


def never_end(record: Record) -> None:
    """A turn has no end."""
    record.session.audit.pop()


def end_twice(record: Record) -> None:
    """A turn ends twice."""
    record.session.audit.append({**EVENTS[-1], "seq": 11, "last_seq": 10})


def post_twice(record: Record) -> None:
    """The work is done twice."""
    record.executions.append(Execution(2, "r-1", "t1", []))
    record.posts.append(record.posts[0]._replace(execution=2))


def two_turns_for_one_message(record: Record) -> None:
    """A message that was sent again became a second turn."""
    record.posts.append(record.posts[0]._replace(key="t3", execution=2))
    record.executions.append(Execution(2, "r-1", "t3", []))


def post_in_other_order(record: Record) -> None:
    """What was asked first reaches the runtime last."""
    record.posts.reverse()


def never_post(record: Record) -> None:
    """A message was acknowledged and never reached the runtime."""
    del record.posts[0]


def lose_turn(record: Record) -> None:
    """A message was acknowledged and its turn is not in the log."""
    record.client("one").sent["m1"].answers[0]["turn_id"] = "t9"


def change_message(record: Record) -> None:
    """The runtime was asked something else."""
    record.posts[0].message["content"] = "y"


def invent_message(record: Record) -> None:
    """The runtime was asked what nobody said."""
    record.posts[0].message["id"] = "m9"


def post_refused(record: Record) -> None:
    """A message was refused and posted."""
    record.posts.append(Post("r-1", "t2", None, record.client("one").sent["m3"].body, 3.0, 1))


def two_winners(record: Record) -> None:
    """Two devices decided one call."""
    record.client("one").sent["m3"].answers[:] = [accepted("m3", "t2")]


def other_decision(record: Record) -> None:
    """The others are told another decision than the winner's."""
    record.session.audit[5]["decision"] = "approve"


def give_up_resumable(record: Record) -> None:
    """A turn that could be carried on is not."""
    record.session.audit[4]["outcome"] = "outcome_unknown"


def cancel_unasked(record: Record) -> None:
    """A turn is cancelled without a cancel."""
    record.session.audit[4]["outcome"] = "cancelled"


def unanswered(record: Record) -> None:
    """A message is never answered."""
    record.client("one").sent["m1"].answers.clear()


def repeat_token_for_v1(record: Record) -> None:
    """A v1 client gets a token again."""
    entries = record.client("three").entries
    entries += [Entry("connect", None), entries[1]]


def skip_for_v1(record: Record) -> None:
    """A v1 client misses an event although its socket lived."""
    del record.client("three").entries[2]


def strange_type_for_v1(record: Record) -> None:
    """A v1 client is shown what it does not know."""
    record.client("three").entries.append(Entry("got", {"type": "turn_started"}))


def say_idle(record: Record) -> None:
    """A client is told that nothing runs, where a turn does."""
    record.client("two").entries[5].value["turn"] = {"id": "t1", "state": "idle"}


def call_too_early(record: Record) -> None:
    """A client is told of a call before the events that led to it."""
    record.client("two").entries[1].value["pending"] = [CALL]


PLANTED: list[tuple[Callable[[Record], None], str]] = [
    (drop_event, "gap"),
    (repeat_event, "repeated"),
    (swap_events, "gap"),
    (change_event, "repeated"),
    (resume_too_late, "gap"),
    (resume_without_word, "gap"),
    (lose_token_in_merge, "lost"),
    (needless_snapshot, "lost"),
    (stay_behind, "lost"),
    (lose_the_end, "lost"),
    (event_after_end, "turns"),
    (never_end, "stuck"),
    (end_twice, "repeated"),
    (post_twice, "repeated"),
    (two_turns_for_one_message, "repeated"),
    (post_in_other_order, "reordered"),
    (never_post, "lost"),
    (lose_turn, "lost"),
    (change_message, "protocol"),
    (invent_message, "protocol"),
    (post_refused, "protocol"),
    (two_winners, "decisions"),
    (other_decision, "decisions"),
    (give_up_resumable, "lost"),
    (cancel_unasked, "lost"),
    (unanswered, "stuck"),
    (say_idle, "protocol"),
    (call_too_early, "protocol"),
    (repeat_token_for_v1, "repeated"),
    (skip_for_v1, "gap"),
    (strange_type_for_v1, "protocol"),
]


def test_a_record_without_a_broken_promise_passes() -> None:
    """Cuts, merged tokens, a refused decision and a v1 client are nothing to complain of."""
    assert perfect().check() == []


@pytest.mark.parametrize(("plant", "rule"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_found(plant: Callable[[Record], None], rule: str) -> None:
    """Each kind, alone in a record."""
    record = perfect()
    plant(record)
    assert rule in {violation.rule for violation in record.check()}
