"""The multiplexed endpoint (protocol.md section 5): one v2 socket, many sessions.

    connection nursery (connection.py)
    ├── multiplexed reader         socket → the session that each message names
    │   └── lane flushers          one per session, while that session's window or the socket is full
    ├── buffer flusher             the shared socket
    ├── heartbeat · identity watch

An error of one session never closes the socket: the session is detached with the code that its own socket
would have been closed with (``detached``), and can be attached again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn

import trio
from attrs import evolve, frozen

from gateway.core.client_messages import Attach, Authenticate, Detach, message_id_of, parse_client_message
from gateway.core.delivery import nack_fields
from gateway.core.effects import Refused
from gateway.core.errors import GatewayError, InvalidMessage, Overloaded
from gateway.core.flow import Flow
from gateway.core.session_id import is_session_id
from gateway.core.websocket_protocol import CloseCode
from gateway.engine.client_reader import ClientReader, decode_messages
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.message_rate import MessageRate
from gateway.engine.relayed_lane import RelayedLane
from gateway.engine.session_socket import SessionSocket
from gateway.engine.shared_socket import SessionLane, SharedSocket
from gateway.ports import Admission, ClientConnection, ConnectionClosed, ResumePoint, Telemetry

MAX_ATTACHED = 256
"""Sessions on one socket: more windows than any IDE opens, and a bound on what one socket can hold."""


@frozen
class Joined:
    """A session that a lane has joined; of another node, it is both in one."""

    socket: SessionSocket | RelayedLane
    reader: ClientReader | RelayedLane


JoinSession = Callable[[SessionLane, Admission], Awaitable[Joined]]
"""Finds or loads the session, checks that it is the caller's, and joins it; raises ``GatewayError``."""


@frozen
class _Attached:
    lane: SessionLane
    joined: Joined


class MultiplexedReader:
    """Reads a multiplexed socket, and owns the sessions that are attached to it."""

    def __init__(
        self,
        connection: ClientConnection,
        shared: SharedSocket,
        admission: Admission,
        *,
        identity: IdentityWatch,
        join: JoinSession,
        telemetry: Telemetry,
        flow: Flow,
        rate: MessageRate,
    ) -> None:
        self._connection = connection
        self._flow = flow
        self._shared = shared
        self._admission = admission
        self._identity = identity
        self._join = join
        self._telemetry = telemetry
        self._rate = rate
        self._attached: dict[str, _Attached] = {}

    async def run(self) -> NoReturn:
        """Read until the socket is gone. Raises ``ConnectionClosed``; then no session is attached."""
        closed: ConnectionClosed | None = None
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    frame = await self._connection.receive()
                    self._flow.note_received(frame)
                    await self._take(frame, nursery)
            except ConnectionClosed as reason:
                closed = reason
            finally:
                for session_id in list(self._attached):
                    self._leave(session_id)
            nursery.cancel_scope.cancel()
        assert closed is not None
        raise closed

    async def _take(self, frame: str | bytes, nursery: trio.Nursery) -> None:
        try:
            messages = decode_messages(frame, self._admission.dialect)
        except InvalidMessage as error:
            self._refuse(self._rate.refusal(self._identity.identity, error), {})
            return
        for number, (fields, raw) in enumerate(messages):
            if number:
                # However many there are in one frame, other sockets have their turn in between.
                await trio.lowlevel.checkpoint()
            try:
                await self._handle(fields, raw, nursery)
            except InvalidMessage as error:
                self._refuse(self._rate.refusal(self._identity.identity, error), fields)
            except GatewayError as error:
                self._refuse(error, fields)

    async def _handle(self, fields: dict[str, object], raw: bytes, nursery: trio.Nursery) -> None:
        kind = fields.get("type")
        if kind in ("attach", "detach", "authenticate"):
            message = parse_client_message(fields, raw, v2=True)
            self._telemetry.count("gateway_messages_received_total", type=str(kind))
            self._rate.check(self._identity.identity)
            if isinstance(message, Authenticate):
                await self._identity.renew(message.token)
            elif isinstance(message, Detach):
                if message.session_id in self._attached:
                    self._detach(message.session_id, CloseCode.NORMAL, "detached")
            elif isinstance(message, Attach):
                await self._attach(message, nursery)
            return
        session_id = fields.get("session_id")
        if not isinstance(session_id, str):
            raise InvalidMessage(
                "Missing field: session_id (on this socket every message names its session)."
            )
        attached = self._attached.get(session_id)
        if attached is None:
            raise InvalidMessage("This session is not attached to this socket; send attach first.")
        await attached.joined.reader.handle(fields, raw)

    async def _attach(self, message: Attach, nursery: trio.Nursery) -> None:
        session_id = message.session_id
        if not is_session_id(session_id):
            raise InvalidMessage("Field session_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        if session_id in self._attached:
            self._leave(session_id)
        if len(self._attached) >= MAX_ATTACHED:
            raise Overloaded(f"This socket has {MAX_ATTACHED} sessions, as many as it may; detach one first.")
        resume = None
        if message.epoch is not None and message.last_seq is not None:
            resume = ResumePoint(message.epoch, message.last_seq)
        admission = evolve(
            self._admission, session_id=session_id, resume=resume, identity=self._identity.identity
        )
        lane = self._shared.open_lane(session_id)
        try:
            joined = await self._join(lane, admission)
        except BaseException:
            self._shared.close_lane(lane)
            raise
        self._attached[session_id] = _Attached(lane, joined)
        joined.socket.begin(partial(nursery.start_soon, self._flush_lane, session_id, joined))

    async def _flush_lane(self, session_id: str, joined: Joined) -> None:
        try:
            ending = await joined.socket.flush()
        except ConnectionClosed:
            return
        attached = self._attached.get(session_id)
        if ending is not None and attached is not None and attached.joined is joined:
            self._detach(session_id, *ending)

    def _detach(self, session_id: str, code: int, reason: str) -> None:
        self._leave(session_id)
        self._shared.send_control(
            {"type": "detached", "session_id": session_id, "code": int(code), "reason": reason}
        )

    def _leave(self, session_id: str) -> None:
        attached = self._attached.pop(session_id)
        attached.joined.socket.finish()
        attached.joined.socket.leave()
        self._shared.close_lane(attached.lane)

    def _refuse(self, error: GatewayError, fields: dict[str, object]) -> None:
        self._telemetry.count("gateway_errors_total", code=error.code)
        nack = nack_fields(Refused(error, message_id_of(fields, v2=True)))
        session_id = fields.get("session_id")
        if is_session_id(session_id):
            nack["session_id"] = session_id
        self._shared.send_control(nack)
