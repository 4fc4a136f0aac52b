"""A session on a gateway, as an application uses it."""

from __future__ import annotations

import random
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import trio

from gateway.client.address import parse_address
from gateway.client.credentials import Credentials, TokenProvider
from gateway.client.errors import MessageRefused, SessionEnded
from gateway.client.events import (
    Accepted,
    ConnectionState,
    Reconnecting,
    ResumePoint,
    SessionEvent,
    Welcome,
)
from gateway.client.keeper import MESSAGE_ID_BYTES, Encoding, Keeper
from gateway.client.reconnect import ABNORMAL
from gateway.client.transport import TransportSettings


class Session:
    """One session on a gateway. Made by ``open_session``; for use in the Trio run that made it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    # ------------------------------------------------------------------ reading

    def events(self) -> AsyncIterator[SessionEvent]:
        """The session's events, each exactly once, in order; for one task at a time.

        An event is acknowledged once it was taken from here. Who takes none is paced by the gateway,
        and in the end disconnected until it does, senders included.
        Iteration ends when the session is closed by us, and raises ``SessionEnded`` when it ended otherwise.
        Cancellation loses no event.
        """
        return _Events(self._keeper)

    @property
    def state(self) -> ConnectionState:
        """The state of the connection."""
        return self._keeper.connection_state

    @property
    def welcome(self) -> Welcome:
        """What the gateway said when the latest socket was opened."""
        welcome = self._keeper.state.welcome
        assert welcome is not None, "open_session waits for the first welcome"
        return welcome

    @property
    def position(self) -> ResumePoint:
        """Up to where events have come in; a later ``open_session`` can resume from what was *taken*."""
        position = self._keeper.state.position
        assert position is not None, "open_session waits for the first welcome"
        return position

    # ------------------------------------------------------------------ sending
    #
    # All of these return once the gateway holds the message in its store, over however many sockets that
    # takes, and raise ``MessageRefused``, ``MessageTooLarge``, ``OutcomeUnknown`` or ``SessionEnded``.
    # Cancelled, the message is not sent again; whether it was accepted is unknown then, so give a
    # ``message_id`` of your own to be able to send it once more.

    async def send_user_message(
        self,
        content: str,
        *,
        role: str | None = None,
        agent_type: str | None = None,
        metadata: Mapping[str, object] | None = None,
        message_id: str | None = None,
    ) -> Accepted:
        """Say something; the answer's ``turn_id`` names the turn that will carry it out."""
        fields = {"content": content, "role": role, "agent_type": agent_type, "metadata": metadata}
        return await self.send("user_message", fields, message_id=message_id)

    async def switch_agent(
        self,
        agent_type: str,
        *,
        content: str | None = None,
        reason: str | None = None,
        message_id: str | None = None,
    ) -> Accepted:
        """Choose the agent that answers from here on."""
        fields = {"agent_type": agent_type, "content": content, "reason": reason}
        return await self.send("switch_agent", fields, message_id=message_id)

    async def tool_result(
        self,
        call_id: str,
        *,
        result: object = None,
        error: str | None = None,
        tool_name: str | None = None,
        message_id: str | None = None,
    ) -> Accepted:
        """Answer a tool call: with ``result`` (any JSON), or with ``error`` when it failed."""
        fields: dict[str, object] = {"call_id": call_id, "tool_name": tool_name, "error": error}
        return await self.send(
            "tool_result", fields, message_id=message_id, **({} if error is not None else {"result": result})
        )

    async def decide(
        self,
        call_id: str,
        decision: Literal["approve", "edit", "reject"],
        *,
        modified_arguments: Mapping[str, object] | None = None,
        feedback: str | None = None,
        message_id: str | None = None,
    ) -> Accepted:
        """Decide about a call that needs approval. ``MessageRefused`` with ``ALREADY_DECIDED`` if another
        device was first."""
        fields = {
            "call_id": call_id,
            "decision": decision,
            "modified_arguments": modified_arguments,
            "feedback": feedback,
        }
        return await self.send("hitl_decision", fields, message_id=message_id)

    async def cancel(self, turn_id: str | None = None, *, message_id: str | None = None) -> bool:
        """Stop the running turn, or the one named; False when there is none (any more)."""
        try:
            await self.send("cancel", {"turn_id": turn_id}, message_id=message_id)
        except MessageRefused as refused:
            if refused.code == "NO_SUCH_TURN":
                return False
            raise
        return True

    async def send(
        self,
        type: str,  # noqa: A002  # the protocol's own name
        fields: Mapping[str, object],
        *,
        message_id: str | None = None,
        **exact: object,
    ) -> Accepted:
        """Send any message. ``fields`` that are None are left out, those given by keyword are not."""
        message_id = message_id or secrets.token_urlsafe(MESSAGE_ID_BYTES)
        given = {name: value for name, value in fields.items() if value is not None}
        return await self._keeper.send(message_id, {"type": type, "id": message_id, **given, **exact})


class _Events(AsyncIterator[SessionEvent]):
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def __anext__(self) -> SessionEvent:
        return await self._keeper.next_event()


@asynccontextmanager
async def open_session(
    url: str,
    *,
    session_id: str,
    token: str | None = None,
    token_provider: TokenProvider | None = None,
    internal_key: str | None = None,
    encoding: Encoding = "json",
    resume: ResumePoint | None = None,
    connect_timeout: float = float("inf"),
    on_state: Callable[[ConnectionState], None] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    transport: TransportSettings | None = None,
    randomness: Callable[[], float] = random.random,
) -> AsyncIterator[Session]:
    """Open a session on the gateway at ``url`` and keep it connected inside the block.

    ``token_provider`` is awaited for a token whenever one is needed: at first unless ``token`` is given, when
    the one in use is about to expire, and after a close with 4401. An exception of its own counts as "not
    now" and is followed by another attempt. ``resume`` takes up where an earlier run of the program had got
    to (the ``epoch`` and ``seq`` of the last event it took). ``on_state`` is called with each state of the
    connection; it must neither block nor raise.

    Raises ``ValueError`` for a URL, session id or credential that cannot be used, ``SessionEnded`` when the
    gateway refuses for good, and with code 1006 when there is no welcome within ``connect_timeout`` seconds.
    Later failures reach who sends or reads events.

    *Cancellation*: the socket is dropped. Leaving the block closes it properly, within ``close_timeout``.
    """
    address = parse_address(url, session_id)
    settings = transport or TransportSettings(ssl_context=ssl_context)
    keeper = Keeper(
        address,
        credentials=Credentials(token, token_provider, internal_key),
        encoding=encoding,
        settings=settings,
        resume=resume,
        on_state=on_state,
        randomness=randomness,
    )
    # Kept apart from the nursery, which would wrap it in a group.
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        try:
            with trio.move_on_after(connect_timeout) as connecting:
                await keeper.wait_welcome()
            if connecting.cancelled_caught:
                raise SessionEnded(ABNORMAL, _why_not_connected(keeper.connection_state, connect_timeout))
            yield Session(keeper)
        except Exception as error:
            failure = error
        keeper.leave()
        with trio.move_on_after(settings.close_timeout + 1):
            await keeper.wait_ended()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _why_not_connected(state: ConnectionState, waited: float) -> str:
    if isinstance(state, Reconnecting):
        return f"{state.reason} (tried for {waited:g} s)"
    return f"no welcome from the gateway within {waited:g} s"
