"""The conversation that every client holds: a file is asked for, approved, written and confirmed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

Message = dict[str, Any]

RECEIVE_SECONDS = 20.0

REQUEST: Message = {
    "type": "user_message",
    "content": "create hello.py that prints hello",
    "message_id": "m1",
}


class Client(Protocol):
    """A socket as a test sees it."""

    def send(self, message: Message) -> None:
        """Send one message."""
        ...

    def receive(self) -> Message:
        """The next event. Raises when none comes, or the socket closes."""
        ...


class WebsocketsClient:
    """The ``websockets`` library."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._batch: list[Message] = []
        """v2: the rest of a frame that carried several events."""

    def send(self, message: Message) -> None:
        """See ``Client``."""
        self.connection.send(json.dumps(message))

    def receive(self) -> Message:
        """See ``Client``."""
        if not self._batch:
            received = json.loads(self.connection.recv(timeout=RECEIVE_SECONDS))
            self._batch = received if isinstance(received, list) else [received]
        event = self._batch.pop(0)
        assert isinstance(event, dict)
        return event


@contextmanager
def connected(url: str, **options: Any) -> Iterator[WebsocketsClient]:
    """A socket through ``websockets``: v1 unless ``options`` say otherwise, uncompressed, without a proxy."""
    with connect(url, compression=None, proxy=None, **options) as connection:
        yield WebsocketsClient(connection)


def receive_until(client: Client, ends: Callable[[Message], bool]) -> list[Message]:
    """All events up to and including the one that ``ends``."""
    events = [client.receive()]
    while not ends(events[-1]):
        events.append(client.receive())
    return events


def receive_rest(client: Client) -> list[Message]:
    """All events up to the close of the socket."""
    events = []
    with suppress(ConnectionClosed):
        while True:
            events.append(client.receive())
    return events


def is_final(event: Message) -> bool:
    """Whether it ends an answer."""
    return event.get("is_final") is True


def text_of(events: list[Message]) -> str:
    """The tokens put together."""
    return "".join(event["token"] for event in events if event["type"] == "assistant_message")


def hold_conversation(client: Client, *, agents: Sequence[str] = ("coder",)) -> list[Message]:
    """The whole of it, asserted step by step; returns every event.

    ``agents`` are those switched to: none when the session has been with the coder before.
    """
    client.send(REQUEST)
    asked = receive_until(client, lambda event: event["type"] == "tool_call")
    assert asked[0] == {"type": "ack", "message_id": "m1", "status": "received"}
    assert [event["to_agent"] for event in asked if event["type"] == "agent_switched"] == list(agents)
    assert text_of(asked) == "I will create hello.py for you. "
    call = asked[-1]
    assert (call["tool_name"], call["requires_approval"]) == ("write_file", True)
    assert call["arguments"] == {"path": "hello.py", "content": 'print("hello")\n'}

    client.send({"type": "hitl_decision", "call_id": call["call_id"], "decision": "APPROVE"})
    client.send({"type": "tool_result", "call_id": call["call_id"], "result": {"success": True}})
    answered = receive_until(client, is_final)
    assert text_of(answered) == 'Done: hello.py is there. Say "read hello.py" to see it.'
    known = {"ack", "assistant_message", "agent_switched", "tool_call"}
    assert {event["type"] for event in asked + answered} <= known
    return asked + answered
