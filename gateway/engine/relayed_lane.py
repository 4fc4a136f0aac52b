"""A session on a multiplexed socket of this node that runs on another: the counterpart of ``RelayedSocket``.

To the node that runs it it is a socket of its own, in JSON. What concerns the whole socket is this node's
alone: its heartbeat, its expiry, and who may write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.core.errors import InsufficientScope
from gateway.core.identity import SCOPE_WRITE
from gateway.core.letters import Gone, Letter, Said, Took
from gateway.core.websocket_protocol import CloseCode
from gateway.engine.flusher import Ending, Flusher
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.shared_socket import SessionLane
from gateway.ports import ConnectionClosed

_OF_THE_OTHER_NODE = b'{"type":"draining"'
"""It is the other that drains: this socket stays, and its client is told by ``detached``."""


class RelayedLane:
    """What a ``SessionSocket`` and its ``ClientReader`` are to a session of this node.

    ``post`` sends a letter to the node that serves it; ``left`` has it forgotten here.
    """

    def __init__(
        self,
        relay: int,
        lane: SessionLane,
        identity: IdentityWatch,
        post: Callable[[Letter], None],
        left: Callable[[], None],
    ) -> None:
        self._relay = relay
        self._lane = lane
        self._identity = identity
        self._post = post
        self._left = left
        self._received = 0
        self._flusher = Flusher(lambda: bool(lane.waiting), self._wait_taken)

    # ------------------------------------------------------------------ what the other node tells

    def sent(self, payloads: Sequence[bytes]) -> None:
        """Payloads for the client. What its turn has not come for waits in the lane; the other bounds it."""
        self._received += len(payloads)
        try:
            is_taken = self._lane.send_nowait(
                [text for text in payloads if not text.startswith(_OF_THE_OTHER_NODE)]
            )
        except ConnectionClosed:
            return  # The reader of the socket learns it too, and leaves.
        if is_taken:
            self._took()
        else:
            self._flusher.need()

    def end(self, code: int, reason: str) -> None:
        """Detach the session soon; the first call decides the code."""
        self._flusher.end(code, reason)

    def _took(self) -> None:
        self._post(Took(self._relay, self._received))

    # ------------------------------------------------------------------ what the multiplexed reader does

    async def handle(self, fields: dict[str, object], raw: bytes) -> None:
        """Pass a message on. Raises ``InsufficientScope``."""
        if fields.get("type") != "ack" and SCOPE_WRITE not in self._identity.identity.scopes:
            raise InsufficientScope(SCOPE_WRITE)
        self._post(Said(self._relay, raw.decode("utf-8", "surrogatepass")))

    def begin(self, start_flusher: Callable[[], None]) -> None:
        """From now on ``start_flusher`` starts ``flush`` when it is needed."""
        self._flusher.begin(start_flusher)

    def finish(self) -> None:
        """From now on nothing can be started."""
        self._flusher.finish()

    async def flush(self) -> Ending | None:
        """Wait until the lane's turns have come; returns what to detach it with, if it is to be."""
        return await self._flusher.run()

    async def _wait_taken(self) -> None:
        # Without a deadline: the other node has one, for it sees what is not taken.
        await self._lane.wait_sent()
        self._took()

    def leave(self) -> None:
        """The client has left the session, or the socket."""
        self._left()
        self._post(Gone(self._relay, int(CloseCode.NORMAL), "detached"))
