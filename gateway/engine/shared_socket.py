"""One socket that many sessions write to (protocol.md section 5): fair turns, control before events.

``SessionLane`` is to a session what ``ClientConnection`` is: it gives its payloads here, each with the
session's id put in. While the socket takes what it is given, they go out at once; when it does not, every
lane waits in a queue of its own and the sessions take turns, so that a burst of one never delays another
by more than ``TURN_BYTES``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import trio

from gateway.core.codec import replace_field, split_batch
from gateway.core.delivery import BATCH_BYTES, encode_control, encode_v2
from gateway.core.flow import Flow
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.engine.flusher import Ending, Flusher, wait_sent_in_time
from gateway.ports import ClientConnection, ConnectionClosed, Hear

TURN_BYTES = 16 << 10
"""What a session may send before the next one's turn."""

MAX_WAITING_ANSWERS = 1024
"""Answers that wait for a socket that takes nothing while its client goes on asking …"""
MAX_WAITING_BYTES = 4 << 20
"""… and their size: one welcome with its snapshot may hold a whole answer."""

_EVENT_BEGINNINGS = (b'{"seq":', b'{"first_seq":', b"[")
"""How ``core/delivery.py`` begins events; everything else is control."""


class SharedSocket:
    """The writing side of a multiplexed socket. Its flusher is ``flush``, as with ``SessionSocket``."""

    is_v2 = True

    def __init__(self, connection: ClientConnection, dialect: Dialect, limits: Limits, flow: Flow) -> None:
        self._connection = connection
        self.dialect = dialect
        self._limits = limits
        self._flow = flow
        self._control: list[bytes] = []
        self._lanes: deque[SessionLane] = deque()
        """In the order of their turns."""
        self._blocked = False
        self._flusher = Flusher(lambda: self._blocked, self._wait_taken)
        self.alive_at = trio.current_time()
        """When its peer was last known to be there."""
        self.rtt: float | None = None
        """Seconds that the last ping took to be answered."""

    @property
    def unacked_bytes(self) -> int:
        """What waits for its turn; what is on its way is counted by each session's own window."""
        return sum(len(text) for lane in self._lanes for text in lane.waiting)

    def open_lane(self, session_id: str) -> SessionLane:
        """A way for one session to this socket."""
        lane = SessionLane(self, session_id)
        self._lanes.append(lane)
        return lane

    def close_lane(self, lane: SessionLane) -> None:
        """The session leaves; what it has not sent yet is dropped."""
        self._lanes.remove(lane)

    def send_control(self, fields: dict[str, object]) -> None:
        """Send one object; it goes before all events."""
        self._control.append(encode_control(fields, Dialect.V2_JSON))
        self.flush_nowait()
        self._bound_control()

    def give(self, lane: SessionLane, texts: list[bytes]) -> None:
        """Take JSON objects of one session; raises ``ConnectionClosed``."""
        for text in texts:
            if text.startswith(_EVENT_BEGINNINGS):
                lane.waiting.append(text)
                continue
            if lane.is_snapshot(text):
                # It stands for what waits, and goes before it: nothing older may come after it.
                lane.waiting.clear()
                lane.moved()
            self._control.append(text)
        self._flush()
        self._bound_control()

    def _bound_control(self) -> None:
        # Answers, welcomes and snapshots, which a client can ask for again and again without reading any.
        waiting = self._control
        if len(waiting) >= MAX_WAITING_ANSWERS or (waiting and sum(map(len, waiting)) > MAX_WAITING_BYTES):
            self.end(CloseCode.TOO_SLOW, "too slow: answers are not taken; resume when ready")

    def flush_nowait(self) -> None:
        """Send what waits, as far as it goes."""
        try:
            self._flush()
        except ConnectionClosed:
            self._blocked = True  # The reader learns it too and ends the socket.

    def _flush(self) -> None:
        while not self._blocked:
            texts = self._take_turns()
            if not texts:
                return
            payloads = encode_v2(texts, self.dialect)
            self._flow.frames_sent += len(payloads)
            self._flow.bytes_sent += sum(map(len, payloads))
            if not self._connection.send_nowait(payloads):
                self._blocked = True
                self._flusher.need()

    def _take_turns(self) -> list[bytes]:
        """The next texts to send: all control, then one turn of each session that has something."""
        texts, self._control = self._control, []
        size = 0
        for _ in range(len(self._lanes)):
            if size >= BATCH_BYTES:
                break
            lane = self._lanes[0]
            self._lanes.rotate(-1)
            turn = 0
            while lane.waiting and turn < TURN_BYTES:
                text = lane.waiting.popleft()
                turn += len(text)
                texts.append(text)
            size += turn
            if turn:
                lane.moved()
        return texts

    # ------------------------------------------------------------------ as SessionSocket, for run_connection

    def begin(self, start_flusher: Callable[[], None]) -> None:
        """From now on ``start_flusher`` starts ``flush`` when it is needed."""
        self._flusher.begin(start_flusher)

    def finish(self) -> None:
        """From now on nothing can be started."""
        self._flusher.finish()

    def end(self, code: int, reason: str) -> None:
        """Close the socket, for all its sessions, soon; the first call decides the code."""
        self._flusher.end(code, reason)

    async def flush(self) -> Ending | None:
        """Wait for the socket until it takes more; returns what to close it with, if it is to be closed.

        Raises ``ConnectionClosed``.
        """
        return await self._flusher.run()

    async def _wait_taken(self) -> Ending | None:
        ending = await wait_sent_in_time(self._connection, self._limits.send_timeout)
        if ending is None:
            self._blocked = False
            self.flush_nowait()
        return ending


class SessionLane(ClientConnection):
    """One session's way to a shared socket. Speaks JSON; the shared socket puts it into the dialect."""

    def __init__(self, shared: SharedSocket, session_id: str) -> None:
        self._shared = shared
        self._session_id = session_id
        # A session id is plain ASCII without quotes or backslashes (core/session_id.py).
        self._prefix = b'{"session_id":"%b",' % session_id.encode()
        self._snapshot = self._prefix + b'"type":"snapshot",'
        self._moved: trio.Event | None = None
        self.waiting: deque[bytes] = deque()
        """Events that have not had their turn."""

    @property
    def dialect(self) -> Dialect:
        """What the shared socket speaks."""
        return self._shared.dialect

    @property
    def rtt(self) -> float | None:
        """Seconds that the shared socket's last ping took to be answered."""
        return self._shared.rtt

    def is_snapshot(self, text: bytes) -> bool:
        """Whether a control text is the session's snapshot, which replaces events."""
        return text.startswith(self._snapshot)

    def moved(self) -> None:
        """Some of what waited went out."""
        if not self.waiting and self._moved is not None:
            self._moved.set()

    @property
    def sends_pings(self) -> bool:
        """The shared socket's heartbeat is for all."""
        return False

    @property
    def unsent(self) -> int:
        """Payloads that have not had their turn."""
        return len(self.waiting)

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Give payloads of ``core/delivery.py``, in JSON, to the shared socket; see the port."""
        texts: list[bytes] = []
        for payload in payloads:
            if payload.startswith(b"["):
                texts.extend(self._tag(text) for text in split_batch(payload))
            else:
                texts.append(self._tag(payload))
        self._shared.give(self, texts)
        return not self.waiting

    async def wait_sent(self) -> None:
        """Wait until everything had its turn."""
        await trio.lowlevel.checkpoint()
        while self.waiting:
            self._moved = trio.Event()
            await self._moved.wait()

    def _tag(self, text: bytes) -> bytes:
        if b'"session_id"' in text:
            # Its own already (welcome), or a field of the agent's that means something else.
            return replace_field(text, "session_id", self._session_id)
        if text.startswith(_EVENT_BEGINNINGS):
            # After the seq, by whose place at the beginning events are known.
            cut = text.index(b",", text.index(b'"seq":')) + 1
            return text[:cut] + self._prefix[1:] + text[cut:]
        return self._prefix + text[1:]

    async def receive(self, hear: Hear | None = None) -> str | bytes:  # noqa: ARG002
        """Never: the shared socket has one reader for all."""
        await trio.sleep_forever()
        raise AssertionError

    async def ping(self) -> None:
        """Never: see ``sends_pings``."""
        await trio.sleep_forever()

    async def close(self, code: int, reason: str = "") -> None:  # noqa: ARG002
        """Nothing: a session that ends here leaves the socket to the others."""
        await trio.lowlevel.checkpoint()
