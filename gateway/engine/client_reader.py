"""The client reader: what a socket says, decoded, checked and handed to its session.

It never waits on anything slow: a client that cannot be read would not be seen to answer pings either.
"""

from __future__ import annotations

from typing import NoReturn

import trio

from gateway.core.client_messages import (
    Ack,
    Attach,
    Authenticate,
    Cancel,
    ClientMessage,
    Detach,
    message_id_of,
    parse_client_message,
)
from gateway.core.codec import decode_json_frame, decode_json_object, decode_msgpack_frame
from gateway.core.effects import Refused
from gateway.core.errors import GatewayError, InsufficientScope, InvalidMessage, RateLimited
from gateway.core.identity import ANONYMOUS_SUBJECT, SCOPE_WRITE, Identity
from gateway.core.rate_limit import RateLimiter, address_caller, subject_caller
from gateway.core.session import Sender
from gateway.core.websocket_protocol import Dialect
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.session_runner import SessionRunner
from gateway.engine.session_socket import SessionSocket
from gateway.ports import Admission, ClientConnection, Telemetry

_Decoded = tuple[dict[str, object], bytes]


class ClientReader:
    """Reads one socket until it is closed."""

    __slots__ = (
        "_admission",
        "_connection",
        "_identity",
        "_message_rate",
        "_runner",
        "_socket",
        "_telemetry",
        "_v2",
    )

    def __init__(
        self,
        connection: ClientConnection,
        socket: SessionSocket,
        runner: SessionRunner,
        admission: Admission,
        *,
        identity: IdentityWatch,
        telemetry: Telemetry,
        message_rate: RateLimiter,
    ) -> None:
        self._connection = connection
        self._socket = socket
        self._runner = runner
        self._admission = admission
        self._identity = identity
        self._telemetry = telemetry
        self._message_rate = message_rate
        self._v2 = admission.dialect.is_v2

    async def run(self) -> NoReturn:
        """Read until the socket is gone. Raises ``ConnectionClosed``."""
        while True:
            frame = await self._connection.receive()
            self._count(frame)
            try:
                messages = self._decode(frame)
            except InvalidMessage as error:
                self._refuse(error, {})
                continue
            for fields, raw in messages:
                await self.handle(fields, raw)

    async def handle(self, fields: dict[str, object], raw: bytes) -> None:
        """Carry out one decoded message; one that cannot be is answered with why."""
        try:
            await self._handle(fields, raw)
        except GatewayError as error:
            self._refuse(error, fields)

    def _count(self, frame: str | bytes) -> None:
        flow = self._runner.flow
        flow.frames_received += 1
        if isinstance(frame, bytes) or frame.isascii():
            flow.bytes_received += len(frame)
        else:
            flow.bytes_received += len(frame.encode("utf-8", "surrogatepass"))

    def _decode(self, frame: str | bytes) -> list[_Decoded]:
        dialect = self._admission.dialect
        if isinstance(frame, bytes):
            if dialect is not Dialect.V2_MSGPACK:
                raise InvalidMessage("Invalid JSON message: this socket speaks JSON in text frames.")
            return decode_msgpack_frame(frame)
        if dialect is Dialect.V2_MSGPACK:
            raise InvalidMessage(
                "Invalid MessagePack message: this socket speaks MessagePack in binary frames."
            )
        if dialect is Dialect.V2_JSON:
            return decode_json_frame(frame)
        raw = frame.encode("utf-8", "surrogatepass")
        return [(decode_json_object(raw), raw.strip())]

    async def _handle(self, fields: dict[str, object], raw: bytes) -> None:
        message: ClientMessage = parse_client_message(fields, raw, v2=self._v2)
        if isinstance(message, Ack):
            self._runner.flow.acks_received += 1
            self._socket.acknowledge(message.seq)
            return
        self._telemetry.count("gateway_messages_received_total", type=str(fields["type"]))
        identity = self._identity.identity
        self._check_rate(identity)
        if isinstance(message, Authenticate):
            await self._identity.renew(message.token)
            return
        if isinstance(message, Attach | Detach):
            raise InvalidMessage(
                "attach and detach are for the multiplexed endpoint; this socket has its session."
            )
        if SCOPE_WRITE not in identity.scopes:
            raise InsufficientScope(SCOPE_WRITE)
        if isinstance(message, Cancel):
            self._telemetry.info(
                "cancel_received", session_id=self._runner.session_id, request_id=self._admission.request_id
            )
        sender = Sender(identity.subject, self._admission.request_id, self._v2)
        self._runner.receive(message, sender, self._socket)

    def _check_rate(self, identity: Identity) -> None:
        try:
            now = trio.current_time()
            self._message_rate.check(address_caller(self._admission.client_address), now)
            if identity.subject != ANONYMOUS_SUBJECT and not identity.sees_all:
                self._message_rate.check(subject_caller(identity.subject), now)
        except RateLimited:
            self._telemetry.count("gateway_rate_limited_total", what="messages")
            raise

    def _refuse(self, error: GatewayError, fields: dict[str, object]) -> None:
        self._telemetry.count("gateway_errors_total", code=error.code)
        self._runner.last_error = error.code
        call_id = fields.get("call_id")
        self._socket.answer(
            Refused(
                error,
                message_id_of(fields, v2=self._v2),
                call_id if isinstance(call_id, str) and len(call_id) <= 256 else None,
            )
        )
