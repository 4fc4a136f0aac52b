"""Letters from node to node, by Redis' publish and subscribe: one channel and one subscription per node.

What is posted while a publication is under way goes with the next one: load makes publications larger, not
more frequent. Publications can get lost, when a subscription breaks or Redis restarts; each pair of nodes
numbers them, so a loss is noticed by the next one, and at once where Redis says that nobody listens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

import trio

from gateway.adapters.stores.redis_connection import RedisConnection, Subscription
from gateway.adapters.stores.redis_link import TROUBLE, Command, close_buffers, run_until_lost
from gateway.core.errors import StoreUnavailable
from gateway.core.letters import Letter, UnreadableLetter, decode_batch, encode_batch
from gateway.node_ports import NodeMail
from gateway.ports import Telemetry

_RECONNECT_SECONDS = 0.1
_WATCH_SECONDS = 1.0
_NODE_NAME = 64
"""Bytes kept for the sender's name before each batch: padded, so that nothing needs to be escaped."""

Take = Callable[[str, Sequence[Letter]], None]
Lost = Callable[[str], None]


class RedisMail(NodeMail):
    """See ``node_ports.NodeMail``. ``node``: this node's name."""

    def __init__(self, connection: RedisConnection, *, node: str, telemetry: Telemetry) -> None:
        self._connection = connection
        self._node = node
        self._telemetry = telemetry
        self._outbox: dict[str, list[Letter]] = {}
        self._posted = trio.lowlevel.ParkingLot()
        self._sent: defaultdict[str, int] = defaultdict(int)
        self._due: dict[str, int | None] = {}
        """By node the number of its next publication; None: any, for what is missing before it was told."""
        self._lost: Lost = _nobody_cares

    def post(self, node: str, letter: Letter) -> None:
        """Send soon."""
        if not self._outbox:
            self._posted.unpark()
        self._outbox.setdefault(node, []).append(letter)

    def forget(self, node: str) -> None:
        """That node is dead; a node that comes later has another name."""
        self._outbox.pop(node, None)
        self._sent.pop(node, None)
        self._due.pop(node, None)
        self._lost(node)

    async def run(
        self, take: Take, lost: Lost, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Send and receive until cancelled; see the port."""
        self._lost = lost
        async with trio.open_nursery() as nursery:
            await nursery.start(self._receive, take, nursery)
            nursery.start_soon(self._send)
            task_status.started()

    # ------------------------------------------------------------------ sending

    async def _send(self) -> None:
        while True:
            while not self._outbox:
                await self._posted.park()
            outbox, self._outbox = self._outbox, {}
            commands: list[Command] = []
            for node, letters in outbox.items():
                batch = self._node.encode().ljust(_NODE_NAME) + encode_batch(self._sent[node], letters)
                self._sent[node] += 1
                commands.append((self._connection.publish_command, _channel(node), batch))
            try:
                answers = await self._connection.batch(commands)
            except StoreUnavailable as error:
                answers = [error] * len(commands)
                # Telling of the loss makes letters again, which would fail as fast.
                await trio.sleep(_RECONNECT_SECONDS)
            for node, answer in zip(outbox, answers, strict=True):
                if isinstance(answer, BaseException) or answer == 0:
                    self._lost(node)

    # ------------------------------------------------------------------ receiving

    async def _receive(
        self, take: Take, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]
    ) -> None:
        is_first = True
        while True:
            subscription: Subscription | None = None
            try:
                subscription = self._connection.subscription(_channel(self._node))
                connection, over, begun = subscription.connection, trio.Event(), trio.Event()
                await nursery.start(run_until_lost, connection, over)
                connection.send_command(subscription.command, _channel(self._node))
                nursery.start_soon(self._watch, subscription, begun, over)
                async with aclosing(connection.push_messages) as messages:
                    async for message in messages:
                        kind, _, data = cast("list[Any]", message)
                        if kind in (b"message", b"smessage"):
                            self._open(take, data)
                        elif kind == b"sunsubscribe":
                            # The channel's slot has moved, in a cluster.
                            break
                        else:
                            begun.set()
                            if is_first:
                                is_first = False
                                task_status.started()
            except (*TROUBLE, StoreUnavailable) as error:
                # coredis makes an error of a cancellation that strikes while it connects.
                await trio.lowlevel.checkpoint_if_cancelled()
                if is_first:
                    raise self._connection.unavailable(error) from error
            finally:
                if subscription is not None:
                    subscription.connection.invalidate("over")
                    close_buffers(subscription.connection)
            # Nobody can say what was published meanwhile.
            for node in {*self._due, *self._sent}:
                self._due[node] = None
                self._lost(node)
            await trio.sleep(_RECONNECT_SECONDS)

    async def _watch(self, subscription: Subscription, begun: trio.Event, over: trio.Event) -> None:
        """Cut a subscription that will never hear anything, which looks like one without letters.

        A broken network keeps it silent, or what is published goes to another server, or it was refused.
        """
        connection = subscription.connection
        while not over.is_set():
            with trio.move_on_after(_WATCH_SECONDS):
                await over.wait()
                return
            try:
                await connection.create_request(b"PING")
            except TROUBLE:
                connection.invalidate("no answer in time")
                return
            if not begun.is_set() or not self._connection.is_current(
                subscription.address, _channel(self._node)
            ):
                connection.invalidate("not where letters are published")
                return

    def _open(self, take: Take, data: bytes) -> None:
        sender = data[:_NODE_NAME].rstrip().decode()
        try:
            number, letters = decode_batch(data[_NODE_NAME:])
        except UnreadableLetter as error:
            self._telemetry.error("letters_unreadable", node=sender, cause=error)
            self._lost(sender)
            return
        due, self._due[sender] = self._due.get(sender, 0), number + 1
        if due is not None and number != due:
            self._telemetry.warning("letters_lost", node=sender, publications=number - due)
            self._lost(sender)
        take(sender, letters)


def _channel(node: str) -> bytes:
    return b"gateway:node:" + node.encode()


def _nobody_cares(_: str) -> None:
    """Before ``run`` nobody has anything to lose."""
