"""The session's state machine: ``(input, now) → effects``, driven without a clock or a socket."""

from __future__ import annotations

from itertools import count
from typing import Any

import orjson
import pytest

from gateway.core.agent_events import AgentEvent
from gateway.core.client_messages import Cancel, HitlDecision, ToolResult, UserMessage
from gateway.core.effects import Accepted, Effect, Refused, StartTurn, StopTurn
from gateway.core.errors import AgentTimeout
from gateway.core.events import Event, EventKind
from gateway.core.limits import Limits
from gateway.core.session import Sender, Session
from gateway.core.storage import SessionCommit, StoredSession, TurnState
from gateway.core.turn_states import Outcome

V1, V2 = Sender("ada", "r", False), Sender("ada", "r", True)


class Store:
    """What a durable store would hold, kept by applying each commit."""

    def __init__(self) -> None:
        self.found = StoredSession("s", "ada", None, 1, 0)

    def apply(self, session: Session) -> SessionCommit | None:
        """Store what the session has changed and tell it so."""
        commit = session.take_commit()
        if commit is None:
            return None
        found = self.found
        if commit.events:
            assert commit.events[0].seq == found.last_seq + 1
        events = [e for e in (*found.events, *commit.events) if e.seq > (commit.trimmed_to or 0)]
        queue = [m for m in (*found.queue, *commit.queued) if m.turn_id not in commit.dequeued]
        self.found = StoredSession(
            "s",
            "ada",
            commit.record or found.record,
            events[0].seq if events else session.log.last_seq + 1,
            commit.events[-1].seq if commit.events else found.last_seq,
            tuple(events),
            commit.last_event_id or found.last_event_id,
            tuple(queue),
            (*found.ledger, *commit.ledger),
            (*found.decisions, *commit.decisions),
        )
        if commit.record is not None:
            session.show(commit.record)
        return commit


def make(store: Store | None = None, **limits: Any) -> Session:
    """A session; with a store, as loaded from it."""
    numbers = count(1)
    return Session(
        "s",
        limits=Limits(**limits),
        new_id=lambda: f"t{next(numbers)}",
        stored=store.found if store else None,
        keeps_commits=store is not None,
    )


def user(message_id: str | None = None, body: bytes = b"{}") -> UserMessage:
    """A user message."""
    return UserMessage(message_id, body)


def decision(call_id: str, what: str = "approve", message_id: str | None = None) -> HitlDecision:
    """A decision."""
    return HitlDecision(message_id, b"{}", call_id, what)


def token(text: str) -> AgentEvent:
    """A token."""
    data = orjson.dumps({"type": "assistant_message", "token": text, "is_final": False})
    return AgentEvent(EventKind.TOKEN, "assistant_message", data, text)


def call(call_id: str, *, approval: bool = False) -> AgentEvent:
    """A tool call."""
    data = orjson.dumps({"type": "tool_call", "call_id": call_id, "requires_approval": approval})
    return AgentEvent(EventKind.AGENT, "tool_call", data, call_id=call_id, requires_approval=approval)


def started(effects: list[Effect]) -> str:
    """The id of the turn that these effects start."""
    (turn_id,) = [effect.message.turn_id for effect in effects if isinstance(effect, StartTurn)]
    return turn_id


def log_of(session: Session, after: int = 0) -> list[dict[str, Any]]:
    """The events, decoded."""
    return [orjson.loads(event.data) for event in session.log.between(after, session.log.last_seq)]


def state_of(session: Session) -> str:
    """The turn's state, by name."""
    return session.turn_state.value


def types(session: Session) -> list[str]:
    """Their types."""
    return [str(event["type"]) for event in log_of(session)]


# ---------------------------------------------------------------- messages and turns


def test_a_message_starts_its_turn_at_once_when_none_runs() -> None:
    """Accepted with the turn's id, started, and framed in the log."""
    session = make()
    effects = session.receive(user("m"), V2, 5.0)
    turn_id = started(effects)
    assert effects[0] == Accepted("m", turn_id)
    assert log_of(session) == [{"type": "turn_started", "turn_id": turn_id, "id": "m"}]
    assert session.turn_state is TurnState.RUNNING
    assert not session.is_at_rest


def test_one_turn_at_a_time_and_the_next_when_it_ends() -> None:
    """The second message waits; the end of the first turn starts it."""
    session = make()
    first = started(session.receive(user(), V1, 0))
    assert session.receive(user(), V1, 0) == [Accepted(None, "t3")]
    assert session.waiting_messages == 1
    assert started(session.end_turn(first, Outcome.COMPLETED)) == "t3"
    assert types(session) == ["turn_started", "turn_ended", "turn_started"]


def test_what_continues_work_overtakes_user_messages_and_keeps_its_order() -> None:
    """Decision and result go before the user message that came first, in their own order."""
    session = make()
    turn_id = started(session.receive(user(), V1, 0))
    for message in (user(body=b'{"n":1}'), decision("c"), ToolResult(None, b'{"n":3}', "c")):
        session.receive(message, V1, 0)
    bodies = []
    for _ in range(3):
        effects = session.end_turn(turn_id, Outcome.COMPLETED)
        turn_id = started(effects)
        bodies += [effect.message.body for effect in effects if isinstance(effect, StartTurn)]
    assert bodies == [b"{}", b'{"n":3}', b'{"n":1}']


@pytest.mark.parametrize("overtaking", [False, True])
def test_each_queue_is_bounded(overtaking: bool) -> None:
    """One more than may wait is refused, retryable, and changes nothing; the other queue has its own room."""
    session = make(max_queued_messages=2)
    session.receive(user(), V2, 0)
    one, other = (
        (ToolResult("r", b"{}", "c"), user("u")) if overtaking else (user("u"), ToolResult("r", b"{}", "c"))
    )
    for number in range(2):
        session.receive(type(one)(f"m{number}", b"{}"), V2, 0)
    (refused,) = session.receive(one, V2, 0)
    assert isinstance(refused, Refused)
    assert (refused.error.code, refused.error.retryable, refused.message_id) == (
        "QUEUE_FULL",
        True,
        one.message_id,
    )
    assert session.waiting_messages == 2
    assert isinstance(session.receive(other, V2, 0)[0], Accepted)


def test_the_same_id_again_is_the_same_answer_and_no_second_turn() -> None:
    """Within the window a repeat is recognised; after it the id is new; v1 ids are not ids."""
    session = make(dedupe_window=60)
    first = started(session.receive(user("m"), V2, 0))
    assert session.receive(user("m"), V2, 60) == [Accepted("m", first, duplicate=True)]
    assert isinstance(session.receive(user("m"), V1, 60)[0], Accepted)
    assert session.waiting_messages == 1
    assert session.receive(user("m"), V2, 61) != [Accepted("m", first, duplicate=True)]


def test_a_refused_id_is_not_taken_for_accepted_later() -> None:
    """What was not taken is not in the ledger, so that sending it again works."""
    session = make(max_queued_messages=0)
    session.receive(user("m"), V2, 0)
    assert isinstance(session.receive(user("m"), V2, 0)[0], Refused)


def test_events_of_a_turn_that_is_over_are_dropped() -> None:
    """Nothing follows ``turn_ended``, neither of the last turn nor of one before it."""
    session = make()
    first = started(session.receive(user(), V1, 0))
    assert session.agent_event(first, token("a"))
    second_effects = session.receive(user(), V1, 0)
    assert len(second_effects) == 1
    session.end_turn(first, Outcome.COMPLETED)
    before = session.log.last_seq
    assert not session.agent_event(first, token("late"))
    assert session.end_turn(first, Outcome.FAILED) == []
    assert session.log.last_seq == before
    (start,) = [effect for effect in second_effects if isinstance(effect, Accepted)]
    second = start.turn_id
    assert second is not None
    session.receive(Cancel(None, second), V1, 0)
    ended_at = session.log.last_seq
    assert session.turn_id == second
    assert not session.agent_event(second, token("after its own end"))
    assert session.log.last_seq == ended_at


def test_a_failed_turn_says_its_error_before_its_end() -> None:
    """The error names the message that failed; the end names how and where."""
    session = make()
    turn_id = started(session.receive(user("m"), V2, 0))
    session.end_turn(turn_id, Outcome.FAILED, AgentTimeout("Silence. Try again."))
    assert log_of(session, 1) == [
        {
            "type": "error",
            "error": "Silence. Try again.",
            "content": "Silence. Try again.",
            "code": "AGENT_TIMEOUT",
            "retryable": True,
            "message_id": "m",
        },
        {"type": "turn_ended", "turn_id": turn_id, "outcome": "failed", "last_seq": 2},
    ]


# ---------------------------------------------------------------- cancel


def test_cancel_stops_the_running_turn_and_ends_it_in_the_log() -> None:
    """Without a turn id it means the running one; the next message's turn starts."""
    session = make()
    turn_id = started(session.receive(user(), V2, 0))
    waiting = session.receive(user("w"), V2, 0)[0]
    assert isinstance(waiting, Accepted)
    effects = session.receive(Cancel("c", None), V2, 0)
    assert effects[:2] == [Accepted("c", turn_id), StopTurn(turn_id)]
    assert started(effects) == waiting.turn_id
    assert not session.is_running(turn_id)
    assert session.log.between(1, 2)[0].kind is EventKind.CANCELLED


def test_a_turn_that_was_cancelled_does_not_count_as_running() -> None:
    """Its id stays the session's, but a start that comes late must not be performed."""
    session = make()
    turn_id = started(session.receive(user(), V2, 0))
    assert session.is_running(turn_id)
    session.receive(Cancel("c", turn_id), V2, 0)
    assert session.turn_id == turn_id
    assert not session.is_running(turn_id)


def test_a_waiting_message_is_cancelled_by_its_turn_id() -> None:
    """It leaves the queue, its end is said to v2, and the running turn goes on."""
    session = make()
    running = started(session.receive(user(), V2, 0))
    waiting = session.receive(user("w"), V2, 0)[0]
    assert isinstance(waiting, Accepted)
    assert session.receive(Cancel("c", waiting.turn_id), V2, 0) == [Accepted("c", waiting.turn_id)]
    assert session.is_running(running)
    assert session.waiting_messages == 0
    assert log_of(session)[-1]["outcome"] == "cancelled"
    assert session.log.newest.kind is EventKind.V2_ONLY


def test_cancelling_nothing_is_refused_for_v2_and_done_for_v1() -> None:
    """v1 has no turn ids: what its user wanted is so already."""
    session = make()
    (refused,) = session.receive(Cancel("c", None), V2, 0)
    assert isinstance(refused, Refused)
    assert refused.error.code == "NO_SUCH_TURN"
    assert session.receive(Cancel("c", None), V1, 0) == [Accepted("c", None)]


def test_a_repeated_cancel_does_not_hit_the_next_turn() -> None:
    """The id makes it a duplicate of the first, whose turn is over."""
    session = make()
    first = started(session.receive(user(), V2, 0))
    session.receive(Cancel("c", None), V2, 0)
    second = started(session.receive(user("n"), V2, 0))
    assert session.receive(Cancel("c", None), V2, 0) == [Accepted("c", first, duplicate=True)]
    assert session.is_running(second)


def test_abandoning_ends_what_runs_and_all_that_waits() -> None:
    """Every accepted message gets its end, and nothing starts any more."""
    session = make()
    running = started(session.receive(user(), V2, 0))
    session.receive(user("w"), V2, 0)
    session.receive(decision("c", message_id="d"), V2, 0)
    assert session.abandon() == [StopTurn(running)]
    assert session.is_at_rest
    assert [event["outcome"] for event in log_of(session) if event["type"] == "turn_ended"] == [
        "cancelled"
    ] * 3


# ---------------------------------------------------------------- calls and decisions


def test_open_calls_decide_what_the_session_waits_for() -> None:
    """A decision outranks a result; each answer takes its call off; nothing open is idle."""
    session = make()
    turn_id = started(session.receive(user(), V1, 0))
    session.agent_event(turn_id, call("tool"))
    session.agent_event(turn_id, call("ask", approval=True))
    session.end_turn(turn_id, Outcome.COMPLETED)
    assert state_of(session) == "awaiting_approval"
    turn_id = started(session.receive(decision("ask", "reject"), V1, 0))
    session.end_turn(turn_id, Outcome.COMPLETED)
    assert state_of(session) == "awaiting_tool"
    turn_id = started(session.receive(ToolResult(None, b"{}", "tool"), V1, 0))
    session.end_turn(turn_id, Outcome.COMPLETED)
    assert (session.turn_state, session.pending) == (TurnState.IDLE, {})


def test_an_approved_call_waits_for_its_result_and_says_that_it_is_decided() -> None:
    """Approved is not answered: a device that comes later must not ask again."""
    session = make()
    turn_id = started(session.receive(user(), V1, 0))
    session.agent_event(turn_id, call("c", approval=True))
    session.end_turn(turn_id, Outcome.COMPLETED)
    session.receive(decision("c", "edit"), V1, 0)
    pending = session.pending["c"]
    assert not pending.requires_approval
    assert orjson.loads(pending.data)["decision"] == "edit"


def test_the_first_decision_wins() -> None:
    """The second is refused by name of the call and the first decision; nothing is queued for it."""
    session = make()
    session.receive(decision("c", "approve", "d1"), V2, 0)
    (refused,) = session.receive(decision("c", "reject", "d2"), V2, 0)
    assert isinstance(refused, Refused)
    assert (refused.error.code, refused.message_id, refused.call_id) == ("ALREADY_DECIDED", "d2", "c")
    assert session.waiting_messages == 0
    resolved = [event for event in log_of(session) if event["type"] == "approval_resolved"]
    assert resolved == [{"type": "approval_resolved", "call_id": "c", "decision": "approve"}]


def test_open_calls_are_bounded_oldest_out_first() -> None:
    """An agent that never stops calling does not fill the memory."""
    session = make(max_pending_calls=2)
    turn_id = started(session.receive(user(), V1, 0))
    for name in ("a", "b", "c"):
        session.agent_event(turn_id, call(name))
    assert list(session.pending) == ["b", "c"]


# ---------------------------------------------------------------- commits and recovery


def test_a_token_is_stored_without_the_record() -> None:
    """Durability costs no small state per token."""
    store = Store()
    session = make(store)
    turn_id = started(session.receive(user(), V1, 0))
    store.apply(session)
    session.agent_event(turn_id, token("a"), "7")
    commit = store.apply(session)
    assert commit == SessionCommit(
        "s", events=(Event(2, EventKind.TOKEN, token("a").data),), last_event_id="7"
    )
    assert store.apply(session) is None


def test_what_was_accepted_is_there_after_a_restart() -> None:
    """Queue, ledger, decisions, open calls, log and epoch are as they were stored."""
    store = Store()
    session = make(store)
    turn_id = started(session.receive(user("m1"), V2, 1.0))
    session.agent_event(turn_id, call("c", approval=True))
    session.receive(user("m2", b'{"n":2}'), V2, 2.0)
    session.receive(decision("c", "approve", "d1"), V2, 3.0)
    store.apply(session)
    again = make(store)
    assert again.epoch == session.epoch
    assert log_of(again) == log_of(session)
    assert again.waiting_messages == 2
    assert again.receive(user("m2"), V2, 4.0) == [Accepted("m2", "t3", duplicate=True)]
    assert isinstance(again.receive(decision("c", "reject", "d2"), V2, 4.0)[0], Refused)
    assert list(again.pending) == ["c"]
    effects = again.recover()
    assert log_of(again)[-3]["code"] == "OUTCOME_UNKNOWN"
    assert [e.message.message_id for e in effects if isinstance(e, StartTurn)] == ["d1"]


def test_a_resumable_turn_is_carried_on_after_a_restart() -> None:
    """After the last stored event, by the very message it was started with; the queue waits on."""
    store = Store()
    session = make(store)
    turn_id = started(session.receive(user("m1", b'{"n":1}'), V2, 0))
    session.stream_opened(turn_id, resumable=True)
    session.agent_event(turn_id, token("a"), "7")
    session.receive(user("m2"), V2, 0)
    store.apply(session)
    again = make(store)
    (start,) = again.recover()
    assert isinstance(start, StartTurn)
    assert (start.resumes, start.last_event_id, start.message.body) == (True, "7", b'{"n":1}')
    assert again.agent_event(turn_id, token("b"), "8")
    assert again.waiting_messages == 1


def test_a_turn_that_was_left_unsent_is_sent_once() -> None:
    """By whoever loads the session next, as new; if that one crashes, its outcome is unknown."""
    store = Store()
    session = make(store)
    turn_id = started(session.receive(user("m1"), V2, 0))
    session.leave_unsent()
    store.apply(session)
    again = make(store)
    (start,) = again.recover()
    assert isinstance(start, StartTurn)
    assert (start.resumes, start.message.turn_id) == (False, turn_id)
    assert [event["type"] for event in log_of(again)] == ["turn_started"]
    store.apply(again)
    assert make(store).recover() == []
    last = make(store)
    last.recover()
    assert log_of(last)[-1]["outcome"] == "outcome_unknown"


def test_a_session_at_rest_starts_what_still_waits() -> None:
    """A crash between acceptance and start loses no message."""
    store = Store()
    session = make(store)
    session.receive(user("m1"), V2, 0)
    store.apply(session)
    found = store.found
    assert found.record is not None
    session.end_turn("t2", Outcome.COMPLETED)
    store.apply(session)
    again = make(store)
    assert again.recover() == []
    assert again.is_at_rest


def test_a_new_epoch_keeps_the_events_and_is_stored() -> None:
    """Only the name of the numbering changes, atomically with what comes next."""
    store = Store()
    session = make(store)
    session.receive(user(), V1, 0)
    store.apply(session)
    before = session.epoch
    session.renew_epoch()
    assert session.epoch != before
    commit = store.apply(session)
    assert commit is not None
    assert commit.record is not None
    assert (commit.record.epoch, commit.events) == (session.epoch, ())


# ---------------------------------------------------------------- bounds, and what joiners are told


def test_what_the_store_does_not_hold_yet_is_never_trimmed() -> None:
    """However much came during one slow commit: a gap would be refused for good."""
    store = Store()
    session = make(store, replay_events=10)
    turn_id = started(session.receive(user(), V1, 0))
    store.apply(session)
    for _ in range(50):
        session.agent_event(turn_id, token("x"))
    session.trim(1)
    assert (session.log.first_seq, session.log.last_seq) == (2, 51)
    store.apply(session)
    session.trim(51)
    assert len(session.log) <= 10


@pytest.mark.parametrize("durable", [True, False])
def test_the_running_answer_is_whole_whatever_was_trimmed(durable: bool) -> None:
    """Its text outlives its events, also over a restart."""
    store = Store() if durable else None
    session = make(store, replay_events=10)
    turn_id = started(session.receive(user(), V1, 0))
    for number in range(100):
        session.agent_event(turn_id, token(f"{number},"))
        if store:
            store.apply(session)
        session.trim(session.log.last_seq)
    whole = "".join(f"{number}," for number in range(100))
    assert len(session.log) <= 10
    assert session.running_text(session.log.last_seq) == whole
    if store:
        store.apply(session)
        again = make(store)
        assert again.running_text(again.log.last_seq) == whole
    session.end_turn(turn_id, Outcome.COMPLETED)
    if store:
        store.apply(session)
    assert session.running_text(session.log.last_seq) == ""


def test_who_joins_is_told_the_state_that_goes_with_the_events() -> None:
    """Until the end of a turn is stored, the turn runs for clients, and its text is there."""
    store = Store()
    session = make(store)
    turn_id = started(session.receive(user(), V1, 0))
    session.agent_event(turn_id, token("seen "))
    store.apply(session)
    visible = session.log.last_seq
    session.agent_event(turn_id, token("unseen"))
    session.agent_event(turn_id, call("c"))
    session.end_turn(turn_id, Outcome.COMPLETED)
    next_turn = started(session.receive(user(), V1, 0))
    assert (session.shown.turn_id, session.shown.turn_state) == (turn_id, TurnState.RUNNING)
    assert session.shown.pending == ()
    assert session.running_text(visible) == "seen "
    session.trim_to(visible)
    assert session.running_text(visible) == "seen "
    store.apply(session)
    assert session.shown.turn_id == next_turn
    assert len(session.shown.pending) == 1
    assert session.running_text(session.log.last_seq) == ""


def test_without_a_store_the_state_is_told_as_it_is() -> None:
    """Nothing is ahead of what clients see."""
    session = make()
    turn_id = started(session.receive(user(), V1, 0))
    assert session.shown.turn_id == turn_id
    assert session.take_commit() is None
