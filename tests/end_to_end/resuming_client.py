"""A v2 client that comes back as a client in the field does, in a thread of its own."""

from __future__ import annotations

import threading
import time
import uuid

from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.end_to_end.conversation import Message, connected, text_of

COUNT = 100
WHOLE = "".join(f"{n} " for n in range(1, COUNT + 1))


class ResumingClient(threading.Thread):
    """Has the agent count, and comes back as often as its socket breaks; v2, so that it knows its place."""

    def __init__(self, address: str, session: str | None = None) -> None:
        super().__init__(daemon=True)
        self._url = f"{address}/api/v1/ws/{session or uuid.uuid4().hex}"
        self.epochs: set[str] = set()
        self.events: list[Message] = []
        self.sockets = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Until the turn has ended."""
        deadline = time.monotonic() + 40
        try:
            while not any(event["type"] == "turn_ended" for event in self.events):
                assert time.monotonic() < deadline, "it did not end"
                try:
                    self._listen()
                except (ConnectionClosed, OSError, EOFError, InvalidStatus, TimeoutError):
                    time.sleep(0.05)
        except BaseException as error:
            self.failure = error

    def _listen(self) -> None:
        place = f"?epoch={next(iter(self.epochs))}&last_seq={self.events[-1]['seq']}" if self.events else ""
        with connected(self._url + place, subprotocols=["codelab.v2.json"]) as socket:
            self.sockets += 1
            self.epochs.add(socket.receive()["epoch"])
            socket.send({"type": "user_message", "content": f"count to {COUNT}", "id": "m"})
            while True:
                event = socket.receive()
                if "seq" in event and event["type"] != "snapshot":
                    self.events.append(event)
                if event["type"] == "turn_ended":
                    return

    def check(self) -> None:
        """It got every event once and in order, of one turn that was completed."""
        assert self.failure is None
        assert len(self.epochs) == 1
        assert text_of(self.events) == WHOLE
        seqs = [(event.get("first_seq", event["seq"]), event["seq"]) for event in self.events]
        assert [first for first, _ in seqs[1:]] == [last + 1 for _, last in seqs[:-1]]
        assert [event["outcome"] for event in self.events if event["type"] == "turn_ended"] == ["completed"]
