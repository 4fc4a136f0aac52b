"""Sockets that do nothing wrong while others do: each must stay open and get every answer."""

from __future__ import annotations

from itertools import count

import msgspec
import orjson
import trio
import trio_websocket
from attrs import define, field

from tests.hostile.surroundings import Surroundings

PATIENCE = 20.0
"""Seconds that an answer may take: the machine is busy with the attack itself."""
PAUSE = 0.2

DIALECTS = (None, None, "codelab.v2.json", "codelab.v2.json", "codelab.v2.msgpack", "codelab.v2.msgpack")


@define
class Bystanders:
    """Six sockets in three dialects."""

    surroundings: Surroundings
    answers: int = 0
    unanswered: int = 0
    """Turns that failed because the Agent Runtime closed the connection that others had had rubbish on."""
    lost: list[str] = field(factory=list)
    """What happened to those that did not stay."""

    async def run(self) -> None:
        """Converse until cancelled."""
        async with trio.open_nursery() as nursery:
            for number, protocol in enumerate(DIALECTS):
                nursery.start_soon(self._stand_by, number, protocol)

    async def _stand_by(self, number: int, protocol: str | None) -> None:
        token = self.surroundings.issuer.token(f"bystander-{number}", lifetime=86_400)
        url = f"ws://127.0.0.1:{self.surroundings.port}/api/v1/ws/calm-{number}"
        try:
            async with trio_websocket.open_websocket_url(
                url,
                subprotocols=[protocol] if protocol else None,
                extra_headers=[(b"Authorization", f"Bearer {token}".encode())],
            ) as socket:
                for turn in count():
                    with trio.fail_after(PATIENCE):
                        await self._converse(socket, protocol, turn)
                    self.answers += 1
                    await trio.sleep(PAUSE)
        except (trio_websocket.ConnectionClosed, trio_websocket.HandshakeError, trio.TooSlowError) as error:
            self.lost.append(f"bystander {number} ({protocol or 'v1'}): {error!r}")

    async def _converse(
        self, socket: trio_websocket.WebSocketConnection, protocol: str | None, turn: int
    ) -> None:
        message = {"type": "user_message", "content": "hello", "id": f"t{turn}", "message_id": f"t{turn}"}
        if protocol == "codelab.v2.msgpack":
            await socket.send_message(msgspec.msgpack.encode(message))
        else:
            await socket.send_message(orjson.dumps(message).decode())
        while True:
            frame = await socket.get_message()
            received = orjson.loads(frame) if isinstance(frame, str) else msgspec.msgpack.decode(frame)
            for event in received if isinstance(received, list) else [received]:
                if event["type"] == "error" and str(event["code"]).startswith("AGENT_"):
                    self.unanswered += 1
                    return
                if event["type"] in ("error", "nack"):
                    self.lost.append(f"{protocol or 'v1'} was told {event}")
                if protocol and "seq" in event and event["type"] != "ack":
                    await self._acknowledge(socket, protocol, event["seq"])
                if event.get("is_final"):
                    return

    async def _acknowledge(self, socket: trio_websocket.WebSocketConnection, protocol: str, seq: int) -> None:
        ack = {"type": "ack", "seq": seq}
        if protocol == "codelab.v2.msgpack":
            await socket.send_message(msgspec.msgpack.encode(ack))
        else:
            await socket.send_message(orjson.dumps(ack).decode())
