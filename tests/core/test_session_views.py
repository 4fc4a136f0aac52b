"""``welcome`` and ``snapshot``: a whole session in one object."""

from __future__ import annotations

from gateway.core.agent_events import AgentEvent
from gateway.core.client_messages import UserMessage
from gateway.core.events import EventKind
from gateway.core.limits import Limits
from gateway.core.session import Sender, Session
from gateway.core.session_views import snapshot, welcome

LIMITS = Limits(
    max_message_bytes=10, max_queued_messages=2, unacked_bytes=30, dedupe_window=4.0, heartbeat_interval=5.0
)
CALL = b'{"type":"tool_call","call_id":"c"}'


def running_session() -> Session:
    """A session in the middle of an answer, with an open call."""
    session = Session("s", limits=LIMITS, new_id=iter(["epoch", "turn"]).__next__, keeps_commits=False)
    session.receive(UserMessage("m", b"{}"), Sender("ada", "r", True), 0.0)
    for text in (b"a", b"b"):
        data = b'{"type":"assistant_message","token":"%b","is_final":false}' % text
        session.agent_event("turn", AgentEvent(EventKind.TOKEN, "assistant_message", data, text.decode()))
    session.agent_event("turn", AgentEvent(EventKind.AGENT, "tool_call", CALL, call_id="c"))
    return session


def test_welcome_says_where_the_session_is_and_what_its_rules_are() -> None:
    """Every field of the protocol, and no other."""
    assert welcome(running_session(), LIMITS, last_seq=4, resumed=True) == {
        "type": "welcome",
        "session_id": "s",
        "epoch": "epoch",
        "first_seq": 1,
        "last_seq": 4,
        "resumed": True,
        "turn": {"id": "turn", "state": "running"},
        "pending": [{"type": "tool_call", "call_id": "c"}],
        "limits": {"max_message_bytes": 10, "max_queued_messages": 2, "unacked_bytes": 30},
        "dedupe_window_s": 4.0,
        "heartbeat_s": 5.0,
    }


def test_a_snapshot_has_the_running_answer_up_to_its_seq() -> None:
    """The tokens after it follow as events, so they are not in its text."""
    session = running_session()
    assert snapshot(session, "trimmed", last_seq=4) == {
        "type": "snapshot",
        "reason": "trimmed",
        "epoch": "epoch",
        "seq": 4,
        "turn": {"id": "turn", "state": "running"},
        "text": "ab",
        "pending": [{"type": "tool_call", "call_id": "c"}],
    }
    assert snapshot(session, "trimmed", last_seq=2)["text"] == "a"
