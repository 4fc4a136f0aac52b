"""The Protocols between the engine and the outside: what each side may count on.

Adapters implement these (one file each under ``gateway/adapters``), the engine uses them and knows no
library but Trio, tests subclass them as fakes. Everything here runs in one Trio thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from attrs import field, frozen

from gateway.core.identity import Credentials, Identity
from gateway.core.sse import ServerSentEvent
from gateway.core.storage import SessionCommit, StoredSession
from gateway.core.trace_context import TraceContext
from gateway.core.websocket_protocol import Dialect
from gateway.node_ports import SessionLeases

# --------------------------------------------------------------------------- sockets


@frozen
class UpgradeRequest:
    """A WebSocket upgrade as it came in, before anything was decided about it."""

    target: str
    """The raw request target, still percent-encoded: path and query."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in the order received."""
    peer: str
    """Address of the TCP peer, without port."""

    def header(self, name: str) -> str | None:
        """The first value of the header ``name`` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


@frozen
class ResumePoint:
    """Where a v2 client says it stopped: everything after ``last_seq`` of ``epoch`` is missing."""

    epoch: str
    last_seq: int


@frozen
class Admission:
    """An upgrade that was allowed: what the socket is for and who holds it."""

    session_id: str | None
    """None on the multiplexed endpoint, where sessions are attached later."""
    identity: Identity
    dialect: Dialect
    resume: ResumePoint | None = None
    client_address: str = ""
    request_id: str = field(default="")
    trace: TraceContext | None = None

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol to answer with, or None for v1."""
        return self.dialect.value if self.dialect.is_v2 else None

    @property
    def log_fields(self) -> dict[str, object]:
        """The fields that say in a log line which socket is meant."""
        return {
            "session_id": self.session_id,
            "request_id": self.request_id,
            "dialect": self.dialect.value,
            "client": self.client_address,
        }


class ConnectionClosed(Exception):
    """The socket is gone: closed by the peer, by us, or lost.

    ``code`` is the peer's close code, 1005 when it gave none, 1006 when the connection was lost.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}".strip())
        self.code = code
        self.reason = reason


Hear = Callable[[str | bytes], bool]
"""Takes a message without waiting and says True, or leaves it, untouched, and says False."""


class ClientConnection(Protocol):
    """One open WebSocket, upgraded and ready; owned by exactly one ``ConnectionGate.serve`` call.

    Three tasks use it at once: one calls ``receive``, one calls ``send_nowait``/``wait_sent``, one calls
    ``ping``; ``close`` and ``abort`` may come from any. The adapter tears the socket down when the
    ``serve`` call that it was handed to returns or raises.
    """

    @property
    def sends_pings(self) -> bool:
        """False when the server underneath does its own keep-alive and ``ping`` must not be called."""
        ...

    @property
    def unsent(self) -> int:
        """How many of the payloads given to ``send_nowait`` are not wholly in the kernel's hands yet.

        Counted from the newest. Stays readable after the connection is lost: with it the engine knows
        which events this socket cannot have received.
        """
        ...

    async def receive(self, hear: Hear | None = None) -> str | bytes:
        """The next whole data message: str from a text frame, bytes from a binary one.

        An adapter may give a message to ``hear`` as it comes, in any task, while this waits and nothing else
        is to be received before it; one that ``hear`` takes is not returned.

        Raises ``ConnectionClosed``. Cancelling loses no message.
        """
        ...

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Send each payload as one data frame (text or binary by the dialect), in order, without waiting.

        Returns True when the kernel took all of it. False: the rest is buffered here, and the caller
        must ``await wait_sent()`` before it sends more (one call more is still safe, for a control
        message). Raises ``ConnectionClosed`` when the socket is known to be gone.
        """
        ...

    async def wait_sent(self) -> None:
        """Wait until everything given to ``send_nowait`` is in the kernel's hands.

        Raises ``ConnectionClosed``. Cancellation loses nothing: what was buffered stays buffered.
        """
        ...

    async def ping(self) -> None:
        """Send a ping and return when its pong has come. Raises ``ConnectionClosed``.

        No deadline of its own: the caller sets one. A cancelled ping leaves nothing behind.
        """
        ...

    async def close(self, code: int, reason: str = "") -> None:
        """Send a close frame and wait a bounded time (``WS_CLOSE_TIMEOUT``) for the peer's.

        Idempotent, never raises ``ConnectionClosed``; after it ``receive`` raises. What was buffered and
        unsent is dropped when it does not go out within that time. Works, bounded, inside a cancelled
        scope too: then it sends the close frame without waiting and drops the TCP connection.
        """
        ...


class ConnectionGate(Protocol):
    """What the engine offers to the WebSocket adapters: decide about an upgrade, then live its life."""

    async def admit(self, request: UpgradeRequest) -> Admission:
        """Decide about an upgrade. Raises ``GatewayError``: answer ``http_status``, do not upgrade."""
        ...

    async def serve(self, connection: ClientConnection, admission: Admission) -> None:
        """Run the socket until it is over. Returns after closing it; raises only on cancellation or a bug."""
        ...


# --------------------------------------------------------------------------- Agent Runtime


@frozen
class TurnRequest:
    """One POST to the Agent Runtime's stream."""

    session_id: str
    turn_id: str
    """Sent as ``Idempotency-Key``."""
    message: bytes = field(repr=False)
    """The client's message, a JSON object, exactly as the Agent Runtime is to see it."""
    subject: str
    """Sent as ``X-User-ID``."""
    request_id: str
    last_event_id: str | None = None
    """Set only to continue a resumable stream after a cut: sent as ``Last-Event-ID``."""
    trace: TraceContext | None = None


class AgentStream(Protocol):
    """The answer to one POST, after its head was accepted as an event stream."""

    @property
    def resumable(self) -> bool:
        """Whether the runtime said ``X-Stream-Resumable: 1``."""
        ...

    async def receive(self) -> Sequence[ServerSentEvent]:
        """All events completed by what has arrived, at least one; an empty sequence is the end of stream.

        Comments and heartbeats reset the silence clock and are not returned. Raises ``AgentTimeout``
        (nothing at all came for ``AGENT_STREAM_TIMEOUT``; time between calls does not count),
        ``AgentStreamInterrupted`` (the connection ended before the HTTP body did), ``AgentProtocolError``
        (an event over the size limit). After an exception or a cancellation the stream is dead.
        """
        ...

    async def deliver(self, take: Callable[[Sequence[ServerSentEvent]], bool]) -> bool:
        """Give ``take`` what ``receive`` would return, one after the other, until it returns False.

        Returns True at the end of the stream, False when ``take`` wanted no more. ``take`` must not wait; it
        may be called from another task, which saves a task switch per token. It is not called any more from
        the moment of a cancellation on. Raises what ``receive`` does, and what ``take`` does.
        """
        while batch := await self.receive():
            if not take(batch):
                return False
        return True


class AgentRuntime(Protocol):
    """The upstream."""

    def open_stream(self, request: TurnRequest) -> AbstractAsyncContextManager[AgentStream]:
        """POST, and give the stream once its head has come; leaving the block ends it.

        Entering raises ``AgentUnavailable`` (after its own jittered retries), ``AgentRefused``,
        ``AgentProtocolError``, ``AgentTimeout``, ``AgentStreamInterrupted`` (cut before the head came,
        when it can no longer be told whether the request was seen). Leaving before the end, cancelled or
        not, closes the TCP connection, so that the runtime sees the cancel; it never waits.
        """
        ...


# --------------------------------------------------------------------------- store


class SessionStore(Protocol):
    """Where sessions outlive their sockets, and with a durable store the process.

    Contract, the same for every store and proven by one conformance suite:

    * ``commit`` is atomic per ``SessionCommit``: all of one is stored, or none of it. One call may carry
      many; each stands for itself, and for one session they are applied in the order given.
    * When ``commit`` has returned, all of it survives what the store claims to survive: nothing
      (memory), ``kill -9`` (SQLite), also power loss (SQLite with ``STORE_SYNC=full``).
    * What ``load`` gives is a state after some whole number of commits: never a mix.
    * Cancelling ``commit`` never leaves a half: it completes or did not happen.
    """

    @property
    def is_durable(self) -> bool:
        """False: nothing outlives the process; the engine keeps its sessions itself and commits nothing."""
        ...

    @property
    def leases(self) -> SessionLeases | None:
        """Who may write which session, where several nodes share the store; None: it is one process's own."""
        return None

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Apply commits. Raises ``StoreUnavailable`` when they could not be stored: then none was."""
        ...

    def commit_nowait(self, commits: Sequence[SessionCommit]) -> bool:
        """``commit`` in microseconds, if the store can. False: nothing was done. Raises ``CommitRefused``."""
        return not commits

    async def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``StoreUnavailable``."""
        ...

    async def owner(self, session_id: str) -> str | None:
        """The subject that the session belongs to, or None. Raises ``StoreUnavailable``."""
        ...

    async def claim(self, session_id: str, subject: str, now: float) -> str:
        """Make ``subject`` the owner if there is none; returns the owner. Atomic.

        For ``NOBODY`` it makes the session known, so that commits are taken, and leaves it to the first
        subject that claims it; ``NOBODY`` is returned for as long as none has. Raises ``StoreUnavailable``.
        """
        ...

    async def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions that belong to ``subject``. Raises ``StoreUnavailable``."""
        ...

    async def unfinished(self) -> Sequence[str]:
        """Sessions with a turn that was running or messages still queued: what recovery has to look at."""
        ...

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop the events, queue and ledger of sessions last touched before ``before`` (Unix seconds).

        Not of those in ``keep``, which are live. Ownership is kept. Returns how many sessions were dropped.
        Done in small steps.
        """
        ...

    async def maintain(self) -> None:
        """Give space back, in small steps off the token path; called every few seconds."""
        ...

    async def check(self) -> None:
        """Prove that the store can be written. Raises ``StoreUnavailable`` within 1 s."""
        ...


class Authenticator(Protocol):
    """Turns credentials into an identity."""

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """Verify. Raises ``NotAuthenticated`` or ``InvalidToken``, never anything else.

        ``socket`` is True for WebSocket upgrades, where anonymous callers may be allowed. A known signing
        key never waits for the network.
        """
        ...


# --------------------------------------------------------------------------- telemetry


class Telemetry(Protocol):
    """Logs and metrics. None of it raises, blocks or checkpoints; it is called on the hot path.

    Values must be safe to store: never a key, a token, or a message's content.
    """

    def debug(self, event: str, **fields: object) -> None:
        """Log something that only a developer wants."""
        ...

    def info(self, event: str, **fields: object) -> None:
        """Log a step in a life: socket, session, turn, request."""
        ...

    def warning(self, event: str, **fields: object) -> None:
        """Log something unusual that was dealt with."""
        ...

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Log a failure once, where it was dealt with; ``cause`` adds its traceback."""
        ...

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter. ``metric`` and its labels are declared in ``gateway/core/metrics.py``."""
        ...

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Add one observation (seconds, bytes) to a histogram."""
        ...

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...


class Clock(Protocol):
    """Wall-clock time, injected so that tests can state it; durations come from Trio's clock."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        ...
