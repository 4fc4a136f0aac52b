"""Sockets of this node that others serve, and of others that this node serves: who is who.

Nothing is retried. When letters may be missing, every relay with that node ends with 1012 on both sides, and
its clients come back and resume: exactness is the session's and the client's, not the post's.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio
from attrs import evolve

from gateway.core.flow import Flow
from gateway.core.identity import SCOPE_WRITE
from gateway.core.letters import Ended, Gone, Letter, Opened, Said, Sent, Took
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.engine.heartbeat import Heartbeats
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.relayed_lane import RelayedLane
from gateway.engine.relayed_socket import RelayedSocket
from gateway.engine.remote_connection import RemoteConnection
from gateway.engine.shared_socket import SessionLane
from gateway.node_ports import NodeMail
from gateway.ports import Admission, ClientConnection, ResumePoint, Telemetry

_REASON = "restarting; reconnect"


class Relays:
    """All relays of one node."""

    def __init__(
        self,
        mail: NodeMail,
        serve: Callable[[ClientConnection, Admission], Awaitable[None]],
        flow: Flow,
        heartbeats: Heartbeats,
        telemetry: Telemetry,
    ) -> None:
        self._mail = mail
        self._serve = serve
        self._flow = flow
        self._heartbeats = heartbeats
        self._telemetry = telemetry
        self._numbers = itertools.count(1)
        self._held: dict[int, tuple[str, RelayedSocket | RelayedLane]] = {}
        """Sockets of this node and sessions on them, by relay, with the node that serves each."""
        self._served: dict[tuple[str, int], RemoteConnection] = {}
        """Sockets of other nodes, by holder and relay."""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pass letters on, and serve what other nodes hold, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._mail.run, self._take, self._lost)
            task_status.started()
            await trio.sleep_forever()

    @contextmanager
    def open(self, connection: ClientConnection, admission: Admission, node: str) -> Iterator[RelayedSocket]:
        """Have ``node`` serve a socket of this node for as long as the block lasts; run it inside."""
        relay = next(self._numbers)
        post = partial(self._mail.post, node)
        socket = RelayedSocket(
            relay,
            connection,
            admission.dialect,
            post,
            flow=self._flow,
            heartbeats=self._heartbeats,
        )
        self._held[relay] = (node, socket)
        post(_opened(relay, admission))
        try:
            yield socket
        finally:
            del self._held[relay]

    def open_lane(
        self, lane: SessionLane, admission: Admission, identity: IdentityWatch, node: str
    ) -> RelayedLane:
        """Have ``node`` serve a session on a multiplexed socket of this node, until it is left."""
        relay = next(self._numbers)
        post = partial(self._mail.post, node)
        relayed = RelayedLane(relay, lane, identity, post, partial(self._forget, relay))
        self._held[relay] = (node, relayed)
        # The socket's expiry and scopes, which its client may renew, are watched here for all its sessions.
        current = identity.identity
        trusted = evolve(current, expires_at=None, scopes=current.scopes | {SCOPE_WRITE})
        post(_opened(relay, evolve(admission, identity=trusted, dialect=Dialect.V2_JSON)))
        self._telemetry.info("socket_opened", outcome="relayed", **admission.log_fields)
        return relayed

    def _forget(self, relay: int) -> None:
        self._held.pop(relay, None)

    def _lost(self, node: str) -> None:
        for server, socket in list(self._held.values()):
            if server == node:
                socket.end(CloseCode.RESTARTING, _REASON)
        for (holder, relay), connection in list(self._served.items()):
            if holder == node and not connection.is_over:
                self._mail.post(holder, Ended(relay, CloseCode.RESTARTING, _REASON))
                connection.lost(CloseCode.RESTARTING, _REASON)

    def _take(self, sender: str, letters: Sequence[Letter]) -> None:
        for letter in letters:
            if isinstance(letter, Opened):
                self._accept(sender, letter)
            elif isinstance(letter, Sent | Ended):
                held = self._held.get(letter.relay)
                if held is None or held[0] != sender:
                    continue  # It is over here, which the other node is about to learn.
                if isinstance(letter, Sent):
                    held[1].sent(letter.payloads)
                else:
                    held[1].end(letter.code, letter.reason)
            else:
                self._tell(sender, letter)

    def _tell(self, holder: str, letter: Said | Took | Gone) -> None:
        connection = self._served.get((holder, letter.relay))
        if connection is None:
            return
        if isinstance(letter, Said):
            connection.said(letter.frame)
        elif isinstance(letter, Took):
            connection.took(letter.count)
        else:
            connection.gone(letter.code, letter.reason)

    def _accept(self, holder: str, letter: Opened) -> None:
        assert self._nursery is not None, "run has not started"
        connection = RemoteConnection(
            letter.relay, partial(self._mail.post, holder), waits=not letter.dialect.is_v2
        )
        self._served[holder, letter.relay] = connection
        admission = Admission(
            session_id=letter.session_id,
            identity=letter.identity,
            dialect=letter.dialect,
            resume=ResumePoint(letter.epoch, letter.last_seq) if letter.epoch is not None else None,
            client_address=letter.client_address,
            request_id=letter.request_id,
            trace=letter.trace,
        )
        self._nursery.start_soon(self._run_served, holder, letter.relay, connection, admission)

    async def _run_served(
        self, holder: str, relay: int, connection: RemoteConnection, admission: Admission
    ) -> None:
        try:
            await self._serve(connection, admission)
        finally:
            del self._served[holder, relay]


def _opened(relay: int, admission: Admission) -> Opened:
    assert admission.session_id is not None
    resume = admission.resume
    return Opened(
        relay,
        admission.session_id,
        admission.identity,
        admission.dialect,
        resume.epoch if resume is not None else None,
        resume.last_seq if resume is not None else 0,
        admission.client_address,
        admission.request_id,
        admission.trace,
    )
