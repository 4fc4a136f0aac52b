"""Events: what is made per token, and held by the hundred thousand."""

from __future__ import annotations

import gc

import pytest

from gateway.core.agent_events import AgentEvent
from gateway.core.events import Event, EventKind
from gateway.core.sse import ServerSentEvent


@pytest.mark.parametrize(
    "event",
    [
        Event(1, EventKind.TOKEN, b"{}"),
        AgentEvent(EventKind.TOKEN, "assistant_message", b"{}", "text"),
        ServerSentEvent("message", b"{}", "7"),
    ],
)
def test_the_garbage_collector_has_nothing_to_look_at(event: object) -> None:
    """However many events are held, a collection does not take longer for it, and no token starts one."""
    gc.collect()
    assert not gc.is_tracked(event)


def test_an_event_is_a_value() -> None:
    """Equal when its fields are, and not to be changed."""
    event = Event(1, EventKind.AGENT, b"{}")
    assert event == Event(1, EventKind.AGENT, b"{}")
    assert event != Event(2, EventKind.AGENT, b"{}")
    with pytest.raises(AttributeError):
        event.seq = 2  # type: ignore[misc]
