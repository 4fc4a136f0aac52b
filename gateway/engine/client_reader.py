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
from gateway.core.errors import GatewayError, InsufficientScope, InvalidMessage
from gateway.core.identity import SCOPE_WRITE
from gateway.core.session import Sender
from gateway.core.websocket_protocol import Dialect
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.message_rate import MessageRate
from gateway.engine.remote_connection import RemoteConnection
from gateway.engine.session_runner import SessionRunner
from gateway.engine.session_socket import SessionSocket
from gateway.ports import Admission, ClientConnection, Telemetry

_LONGEST_ACK = 64

_Decoded = tuple[dict[str, object], bytes]


class ClientReader:
    """Reads one socket until it is closed."""

    __slots__ = (
        "_admission",
        "_connection",
        "_failure",
        "_identity",
        "_rate",
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
        rate: MessageRate,
    ) -> None:
        self._connection = connection
        self._socket = socket
        self._runner = runner
        self._admission = admission
        self._identity = identity
        self._telemetry = telemetry
        self._rate = rate
        self._v2 = admission.dialect.is_v2
        self._failure: Exception | None = None

    async def run(self) -> NoReturn:
        """Read until the socket is gone. Raises ``ConnectionClosed``."""
        while True:
            frame = await self._connection.receive(self._hear if self._v2 else None)
            if self._failure is not None:
                raise self._failure
            if not isinstance(self._connection, RemoteConnection):  # which is counted where it is held
                self._runner.flow.note_received(frame)
            try:
                messages = decode_messages(frame, self._admission.dialect)
            except InvalidMessage as error:
                self._refuse(self._rate.refusal(self._identity.identity, error), {})
                continue
            for number, (fields, raw) in enumerate(messages):
                if number:
                    # However many there are in one frame, other sockets have their turn in between.
                    await trio.lowlevel.checkpoint()
                await self.handle(fields, raw)

    def _hear(self, frame: str | bytes) -> bool:
        """Carry out a lone acknowledgement at once: it saves two task switches, and there is one a second."""
        if len(frame) > _LONGEST_ACK or not (b"ack" in frame if isinstance(frame, bytes) else "ack" in frame):
            return False
        try:
            ((fields, raw),) = decode_messages(frame, self._admission.dialect)
            message = parse_client_message(fields, raw, v2=True)
        except (InvalidMessage, ValueError):
            return False  # `run` says what is wrong with it
        if not isinstance(message, Ack):
            return False
        try:
            self._acknowledge(message)
        except Exception as error:
            self._failure = error  # `run` raises it, where the hub's bulkhead is
            return False
        self._runner.flow.note_received(frame)
        return True

    def _acknowledge(self, message: Ack) -> None:
        self._runner.flow.acks_received += 1
        self._socket.acknowledge(message.seq)

    async def handle(self, fields: dict[str, object], raw: bytes) -> None:
        """Carry out one decoded message; one that cannot be is answered with why."""
        try:
            message = parse_client_message(fields, raw, v2=self._v2)
        except InvalidMessage as error:
            self._refuse(self._rate.refusal(self._identity.identity, error), fields)
            return
        try:
            await self._handle(message, fields)
        except GatewayError as error:
            self._refuse(error, fields)

    async def _handle(self, message: ClientMessage, fields: dict[str, object]) -> None:
        if isinstance(message, Ack):
            self._acknowledge(message)
            return
        self._telemetry.count("gateway_messages_received_total", type=str(fields["type"]))
        identity = self._identity.identity
        self._rate.check(identity)
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
        sender = Sender(identity.subject, self._admission.request_id, self._v2, self._admission.trace)
        self._runner.receive(message, sender, self._socket)

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


def decode_messages(frame: str | bytes, dialect: Dialect) -> list[_Decoded]:
    """The messages in one frame, each with its JSON bytes. Raises ``InvalidMessage``."""
    if isinstance(frame, bytes):
        if dialect is not Dialect.V2_MSGPACK:
            raise InvalidMessage("Invalid JSON message: this socket speaks JSON in text frames.")
        return decode_msgpack_frame(frame)
    if dialect is Dialect.V2_MSGPACK:
        raise InvalidMessage("Invalid MessagePack message: this socket speaks MessagePack in binary frames.")
    if dialect is Dialect.V2_JSON:
        return decode_json_frame(frame)
    raw = frame.encode("utf-8", "surrogatepass")
    return [(decode_json_object(raw), raw.strip())]
