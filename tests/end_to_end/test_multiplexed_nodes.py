"""One socket with sessions of two gateways on one Redis, of which one is killed."""

from __future__ import annotations

import signal
import time
import uuid
from pathlib import Path

from tests.end_to_end.conversation import Message, WebsocketsClient, connected, text_of
from tests.end_to_end.processes import running_agent, running_gateway
from tests.end_to_end.resuming_client import COUNT, WHOLE
from tests.redis_server import RedisServer

V2 = {"subprotocols": ["codelab.v2.json"]}


class Multiplexed:
    """What has come on it, by session; a session that is detached is attached again where it was."""

    def __init__(self, client: WebsocketsClient) -> None:
        self._client = client
        self.events: dict[str, list[Message]] = {}
        self.detached: list[Message] = []
        self.epochs: dict[str, set[str]] = {}

    def attach(self, session: str) -> None:
        """From the last event on."""
        events = self.events.setdefault(session, [])
        place = {"epoch": next(iter(self.epochs[session])), "last_seq": events[-1]["seq"]} if events else {}
        self._client.send({"type": "attach", "session_id": session, **place})

    def say(self, session: str, content: str) -> None:
        """A message, under an id that stays the same."""
        self._client.send({"type": "user_message", "id": "m", "session_id": session, "content": content})

    def receive(self) -> None:
        """One event."""
        event = self._client.receive()
        session = event["session_id"]
        if event["type"] == "welcome":
            self.epochs.setdefault(session, set()).add(event["epoch"])
        elif event["type"] in ("detached", "nack"):
            assert event.get("code") == 1012 or event["retryable"], event
            self.detached.append(event)
            time.sleep(0.1)
            self.attach(session)
        elif "seq" in event:
            self.events[session].append(event)

    def has_ended(self, session: str) -> bool:
        """Whether its turn has."""
        return any(event["type"] == "turn_ended" for event in self.events[session])


def test_a_session_moves_under_its_socket(redis_server: RedisServer, tmp_path: Path) -> None:
    """The one that the killed node ran is attached again, and its answer goes on; the other stays."""
    settings = {"STORE_URL": redis_server.url, "NODE_LEASE": "1"}
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    away, here = uuid.uuid4().hex, uuid.uuid4().hex
    with (
        running_agent(tmp_path, "--token-delay", "0.03") as agent,
        running_gateway(folders[0], agent.url, **settings) as first,
        running_gateway(folders[1], agent.url, **settings) as second,
        connected(f"{first.socket_url}/api/v1/ws/{away}", **V2) as single,
        connected(f"{second.socket_url}/api/v1/ws", **V2) as client,
    ):
        single.receive()
        socket = Multiplexed(client)
        for session in (away, here):
            socket.attach(session)
            socket.say(session, f"count to {COUNT}")
        while min(len(events) for events in socket.events.values()) < 10:
            socket.receive()
        assert not socket.detached
        assert second.log.count('"outcome": "relayed"') == 1
        first.signal(signal.SIGKILL)
        while not (socket.has_ended(away) and socket.has_ended(here)):
            socket.receive()

    assert {event["session_id"] for event in socket.detached} == {away}
    for session in (away, here):
        events = socket.events[session]
        assert text_of(events) == WHOLE
        assert len(socket.epochs[session]) == 1
        assert [event.get("first_seq", event["seq"]) for event in events[1:]] == [
            event["seq"] + 1 for event in events[:-1]
        ]
        assert events[-1]["outcome"] == "completed"
