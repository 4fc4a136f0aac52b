"""Keeps a session connected over any number of sockets: the Trio shell around ``session_state``.

open_session nursery
└── keeper                 opens sockets one after another, by the rules of ``reconnect``
    └── socket             trio-websocket's reader is beside these, in ``transport``
        ├── reader         frames → state → events, answers
        ├── writer         messages, acknowledgements
        ├── timer          acknowledgements and retries when they are due
        ├── heartbeat      ping, wait for the pong
        └── renewal        a new token, when the gateway asks for one
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal

import trio

from gateway.client.address import Address
from gateway.client.credentials import Credentials, is_header_safe
from gateway.client.effects import (
    Answered,
    Break,
    Deliver,
    Effect,
    LeaveSoon,
    RenewToken,
    Transmit,
    Welcomed,
)
from gateway.client.errors import MessageTooLarge, SessionEnded
from gateway.client.events import (
    Accepted,
    Connected,
    Connecting,
    ConnectionState,
    Ended,
    Reconnecting,
    ResumePoint,
    SessionEvent,
)
from gateway.client.reconnect import ABNORMAL, Backoff, Ending, Verdict, judge
from gateway.client.session_state import SessionState
from gateway.client.transport import Socket, SocketLost, TransportSettings, run_socket
from gateway.core.codec import decode_event_frame, encode_json, json_to_msgpack
from gateway.core.errors import InvalidMessage

Encoding = Literal["json", "msgpack"]

BUFFERED_BYTES = 4 << 20
"""Events that wait for the application; at more, the socket is not read. A gateway that is acknowledged to in
time never sends so much ahead, so this is for many reconnects, and for one that ignores the protocol."""
MESSAGE_ID_BYTES = 12
TOKENS_REFUSED = 3
"""So many fresh tokens refused in a row, and the session ends: the next will not do better."""
_PROTOCOL_ERROR = 1002  # RFC 6455 section 7.4.1


class Keeper:
    """Keeps a session connected."""

    def __init__(
        self,
        address: Address,
        *,
        credentials: Credentials,
        encoding: Encoding,
        settings: TransportSettings,
        resume: ResumePoint | None,
        on_state: Callable[[ConnectionState], None] | None,
        randomness: Callable[[], float],
    ) -> None:
        self._address = address
        self._token = credentials.token
        self._token_provider = credentials.token_provider
        self._internal_key = credentials.internal_key
        self._is_binary = encoding == "msgpack"
        self._subprotocol = f"codelab.v2.{encoding}"
        self._settings = settings
        self._on_state = on_state
        self.state = SessionState(random=randomness, resume=resume)
        self.connection_state: ConnectionState = Connecting(1)
        self._backoff = Backoff(randomness)
        self._events: deque[Deliver] = deque()
        self._buffered = 0
        self._reading = False
        self._outgoing: deque[Transmit] = deque()
        self._answers: dict[str, _Answer] = {}
        self._news = trio.lowlevel.ParkingLot()
        """Unparked at every change; each waiter looks for what it waits for. There are a handful of them."""
        self._leaving: Ending | None = None
        self._leave_at = float("inf")
        self._pause: float | None = None
        self._renewal_wanted = False
        self._tokens_refused = 0
        self.ended: SessionEnded | None = None

    # ------------------------------------------------------------------ for Session

    async def send(self, message_id: str, fields: Mapping[str, object]) -> Accepted:
        """Submit a message and wait for its answer."""
        self._check_size(fields)
        if self.ended is not None:
            raise self.ended
        answer = _Answer()
        effects = self.state.submit(message_id, fields, trio.current_time())
        self._answers[message_id] = answer
        try:
            self._perform(effects)
            await answer.arrived.wait()
        finally:
            del self._answers[message_id]
            self.state.withdraw(message_id)
        if isinstance(answer.value, Accepted):
            return answer.value
        assert answer.value is not None
        raise answer.value

    def _check_size(self, fields: Mapping[str, object]) -> None:
        limit = self.state.welcome.max_message_bytes if self.state.welcome is not None else None
        if limit is not None and (size := len(encode_json(fields))) > limit:
            raise MessageTooLarge(size, limit)

    async def next_event(self) -> SessionEvent:
        """Take the next event."""
        if self._reading:
            raise trio.BusyResourceError("another task is reading this session's events")
        self._reading = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while not self._events:
                if self.ended is not None:
                    if self.ended.code == 1000:
                        raise StopAsyncIteration
                    raise self.ended
                await self._news.park()
        finally:
            self._reading = False
        delivery = self._events.popleft()
        self._buffered -= delivery.size
        self._perform(self.state.taken(delivery.event, delivery.size, trio.current_time()))
        await trio.lowlevel.cancel_shielded_checkpoint()
        return delivery.event

    def leave(self) -> None:
        """Close the session from our side."""
        self._leaving = Ending(1000, "")
        self._changed()

    async def wait_welcome(self) -> None:
        """Wait for the first welcome. Raises ``SessionEnded``."""
        while self.state.welcome is None:
            if self.ended is not None:
                raise self.ended
            await self._news.park()

    async def wait_ended(self) -> None:
        """Wait until the session is over."""
        await self._wait_until(lambda: self.ended is not None)

    # ------------------------------------------------------------------ sockets, one after another

    async def run(self) -> None:
        """Keep the session connected until it is left or has ended for good."""
        try:
            await self._keep_connected()
        finally:
            if self.ended is None:
                self._end(1000, "the session was closed")

    async def _keep_connected(self) -> None:
        needs_token = self._token is None and self._token_provider is not None
        while self._leaving is None:
            await self._wait_until(lambda: self._buffered < BUFFERED_BYTES or self._leaving is not None)
            if needs_token:
                failure = await self._fetch_token()
                if failure is not None:
                    await self._wait_before_next(Ending(4401, failure))
                    continue
                needs_token = False
            self._set_state(Connecting(self._backoff.attempts + 1))
            ending = await self._live_one_socket()
            if self._leaving is not None and self._leaving.code == 1000:
                return
            broke_protocol, self._leaving = self._leaving is not None, None
            if self.state.made_progress:
                self._tokens_refused = 0
                if not broke_protocol:
                    self._backoff.reset()
            verdict = judge(ending.code)
            if verdict is Verdict.NEW_TOKEN:
                self._tokens_refused += 1
                if self._token_provider is None or self._tokens_refused > TOKENS_REFUSED:
                    verdict = Verdict.END
                needs_token = True
            if verdict is Verdict.END:
                self._end(ending.code, ending.reason)
                return
            await self._wait_before_next(ending)

    async def _live_one_socket(self) -> Ending:
        resume = self.state.opened()
        self._outgoing.clear()
        self._leave_at = float("inf")
        self._pause = None
        self._renewal_wanted = False
        try:
            return await run_socket(
                self._address,
                self._address.target(resume),
                subprotocols=[self._subprotocol],
                headers=self._headers(),
                settings=self._settings,
                use=self._use,
            )
        finally:
            self.state.closed()

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = []
        if self._token is not None:
            headers.append((b"Authorization", b"Bearer " + self._token.encode("ascii")))
        if self._internal_key is not None:
            headers.append((b"X-Internal-Auth", self._internal_key.encode("ascii")))
        return headers

    async def _wait_before_next(self, ending: Ending) -> None:
        if self._pause is not None:
            delay, self._pause = max(0.0, self._leave_at - trio.current_time()), None
        else:
            delay = self._backoff.next_delay(at_least=ending.retry_after)
        self._set_state(Reconnecting(delay, max(1, self._backoff.attempts), ending.code, ending.reason))
        with trio.move_on_after(delay):
            await self._wait_until(lambda: self._leaving is not None)

    async def _fetch_token(self) -> str | None:
        """Get a token; returns why there is none, for it may be the network that is away."""
        assert self._token_provider is not None
        try:
            token = await self._token_provider()
        except Exception as error:
            return f"no token: {type(error).__name__}"
        if not is_header_safe(token):
            return "no token: what the provider gave is none"
        self._token = token
        return None

    # ------------------------------------------------------------------ one socket

    async def _use(self, socket: Socket) -> Ending:
        ending: list[Ending] = []
        lost: list[SocketLost] = []
        async with trio.open_nursery() as nursery:

            async def until_over(task: Callable[[Socket], Awaitable[None]]) -> None:
                try:
                    await task(socket)
                except SocketLost as error:
                    lost.append(error)
                    nursery.cancel_scope.cancel()

            for task in (self._read, self._write, self._keep_time, self._send_pings, self._renew_tokens):
                nursery.start_soon(until_over, task)
            ending.append(await self._wait_leaving())
            nursery.cancel_scope.cancel()
        if not ending:
            raise lost[0]
        if ending[0].code == 1000:
            self._perform(self.state.leave(trio.current_time()))
            while self._outgoing:
                await socket.send(self._encode(self._outgoing.popleft()))
        return ending[0]

    async def _wait_leaving(self) -> Ending:
        while self._leaving is None:
            with trio.move_on_at(self._leave_at) as until:
                await self._news.park()
            if until.cancelled_caught:
                return Ending(1001, "the gateway is restarting")
        return self._leaving

    async def _read(self, socket: Socket) -> None:
        while True:
            await self._wait_until(lambda: self._buffered < BUFFERED_BYTES)
            frame = await socket.receive()
            try:
                items = decode_event_frame(frame)
            except InvalidMessage as error:
                self._perform([Break(error.message)])
                continue
            share = len(frame) // len(items) + 1
            self._perform(self.state.receive([(fields, share) for fields in items], trio.current_time()))

    async def _write(self, socket: Socket) -> None:
        while True:
            while self._outgoing:
                await socket.send(self._encode(self._outgoing.popleft()))
            await self._news.park()

    def _encode(self, transmit: Transmit) -> str | bytes:
        data = encode_json(transmit.fields)
        return json_to_msgpack(data) if self._is_binary else data.decode()

    async def _keep_time(self, _socket: Socket) -> None:
        while True:
            wake_at = self.state.next_wake
            with trio.move_on_at(float("inf") if wake_at is None else wake_at):
                await self._news.park()
            now = trio.current_time()
            wake_at = self.state.next_wake
            if wake_at is not None and wake_at <= now:
                self._perform(self.state.wake(now))

    async def _send_pings(self, socket: Socket) -> None:
        with trio.move_on_after(self._settings.open_timeout) as opening:
            await self._wait_until(lambda: self.state.is_live)
        if opening.cancelled_caught or self.state.welcome is None:
            raise SocketLost(Ending(ABNORMAL, "the gateway did not say welcome in time"))
        # The gateway pings too, but that tells only the gateway when the connection is dead.
        while True:
            await trio.sleep(self.state.welcome.heartbeat)
            await socket.ping()

    async def _renew_tokens(self, _socket: Socket) -> None:
        while True:
            await self._wait_until(lambda: self._renewal_wanted)
            self._renewal_wanted = False
            if self._token_provider is not None and await self._fetch_token() is None:
                assert self._token is not None
                renewal_id = secrets.token_urlsafe(MESSAGE_ID_BYTES)
                self._perform(self.state.authenticate(renewal_id, self._token))

    # ------------------------------------------------------------------ effects and news

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Deliver):
                self._events.append(effect)
                self._buffered += effect.size
            elif isinstance(effect, Transmit):
                self._outgoing.append(effect)
            elif isinstance(effect, Answered):
                answer = self._answers.get(effect.message_id)
                if answer is not None:
                    answer.give(effect.answer)
            elif isinstance(effect, Welcomed):
                self._set_state(Connected(effect.welcome))
            elif isinstance(effect, RenewToken):
                self._renewal_wanted = True
            elif isinstance(effect, LeaveSoon):
                self._pause = effect.after
                self._leave_at = trio.current_time() + effect.after
            elif self._leaving is None:
                self._leaving = Ending(_PROTOCOL_ERROR, effect.reason)
        self._changed()

    def _changed(self) -> None:
        self._news.unpark_all()

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await self._news.park()

    def _set_state(self, state: ConnectionState) -> None:
        self.connection_state = state
        if self._on_state is not None:
            self._on_state(state)
        self._changed()

    def _end(self, code: int, reason: str) -> None:
        self.ended = SessionEnded(code, reason)
        for answer in self._answers.values():
            answer.give(self.ended)
        self._set_state(Ended(code, reason))


class _Answer:
    """A sender that waits."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.value: Accepted | Exception | None = None

    def give(self, value: Accepted | Exception) -> None:
        if self.value is None:
            self.value = value
            self.arrived.set()
