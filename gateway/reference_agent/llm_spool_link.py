"""The runtime's side of the LLM spool: finds it or starts it, asks it, and lets it go."""

import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import orjson
import structlog
import trio

from gateway.reference_agent.brain import Piece, Say, Token
from gateway.reference_agent.llm_spool_place import SpoolPlace, place_of
from gateway.reference_agent.llm_spool_protocol import (
    GREETING,
    LOST_AFTER,
    SAME,
    Ask,
    End,
    Failure,
    LineBuffer,
    decode_line,
    identity,
)
from gateway.reference_agent.llm_spool_start import start_spool
from gateway.reference_agent.settings import AgentSettings

START_TIMEOUT = 10.0
"""Seconds a spool may take to start; then the runtime asks the LLM itself."""

GREETING_TIMEOUT = 5.0
"""Seconds a spool that is there may take to greet back: it does nothing that takes long."""

LOOK_INTERVAL = 0.02
"""Seconds between two looks for a spool that is starting."""

NOT_AGAIN_WITHIN = 30.0
"""Seconds for which a spool that could not be started is not tried again."""

LOOKS_FOR_ITS_END = 50
"""For the end of a process whose connection broke, so that it does not stay a zombie."""

RELEASE_TIMEOUT = 1.0


class SpoolUnavailableError(Exception):
    """There is no spool and none can be started: ask the LLM without it."""


class SpoolLostError(Exception):
    """The spool ended, or forgot the answer, before its end: ask again with the text so far."""


class SpoolLink:
    """Asks the spool of one place, which ``start`` starts; one connection says that the runtime is there.

    ``start`` returns a function that says how the started process has ended, or None while it runs.
    """

    def __init__(
        self,
        place: SpoolPlace,
        identity: bytes,
        start: Callable[[], Callable[[], int | None]],
        nursery: trio.Nursery,
    ) -> None:
        self._place = place
        self._identity = identity
        self._start = start
        self._nursery = nursery
        self._door = trio.Lock()
        self._sending = trio.Lock()
        self._presence: trio.SocketStream | None = None
        self._not_before = -float("inf")
        self._exit_code: Callable[[], int | None] = lambda: 0
        self._log = structlog.get_logger("reference_agent.llm")

    async def connect(self) -> None:
        """Find the spool, or start it. Raises `SpoolUnavailableError`."""
        async with self._door:
            if self._presence is not None:
                return
            if trio.current_time() < self._not_before:
                raise SpoolUnavailableError
            try:
                with trio.fail_after(START_TIMEOUT):
                    self._presence = await self._find_or_start()
            except (OSError, NotImplementedError, trio.TooSlowError) as exc:
                self._not_before = trio.current_time() + NOT_AGAIN_WITHIN
                self._log.warning("llm_spool_unavailable", error=str(exc) or type(exc).__name__)
                raise SpoolUnavailableError from exc
            self._nursery.start_soon(self._watch, self._presence)

    async def answer(self, ask: Ask, already_said: str, say: Say) -> None:
        """Say what is new in the answer to ``ask``, which is asked of the LLM unless the spool has it.

        ``already_said`` is the text that the user has. Raises `BrainError` as the LLM's client did,
        `SpoolLostError`, and `SpoolUnavailableError` before anything was said. Cancelling leaves the answer
        with the spool until it is released.
        """
        await self.connect()
        try:
            async with await self._dial_present() as stream:
                await _send(stream, {"ask": attrs.asdict(ask, recurse=False)})
                listener = _Listener(stream)
                heard = Heard(already_said)
                end: End | Failure | None = None
                while end is None:
                    for line in await listener.lines():
                        end = end or heard.take(line)
                    await say(*heard.new_pieces())
        except SpoolLostError:
            self._log.warning("llm_spool_lost", session_id=ask.session_id)
            await self._drop_presence()
            raise
        if isinstance(end, Failure):
            raise end.to_error()

    async def release(self, session_id: str, question: str) -> None:
        """Let the spool stop and forget an answer. Never raises; not torn by cancellation."""
        await self._tell({"release": {"session_id": session_id, "question": question}})

    async def leave(self) -> None:
        """Say that this runtime ends as it should; the spool then ends too, unless it holds an answer."""
        await self._tell({"bye": True})
        await self._drop_presence()

    async def _drop_presence(self) -> None:
        presence, self._presence = self._presence, None
        if presence is not None:
            await trio.aclose_forcefully(presence)

    async def _tell(self, message: Mapping[str, Any]) -> None:
        # If it does not get through, the spool forgets the answer by itself in time.
        with trio.move_on_after(RELEASE_TIMEOUT, shield=True):
            async with self._sending:
                if self._presence is not None:
                    with suppress(SpoolLostError):
                        await _send(self._presence, message)

    async def _watch(self, presence: trio.SocketStream) -> None:
        # When this is cancelled it stays open: `leave` says on it that this is no kill.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await presence.receive_some(1)
        if self._presence is presence:
            await self._drop_presence()
        for _ in range(LOOKS_FOR_ITS_END):
            if self._exit_code() is not None:
                break
            await trio.sleep(LOOK_INTERVAL)

    async def _find_or_start(self) -> trio.SocketStream:
        is_ours = False
        while True:
            with suppress(OSError):  # nobody is there, it is ending, or it was another's and ends now
                return await self._dial()
            code = self._exit_code()
            if code is not None:
                if is_ours and code > 0:
                    raise ChildProcessError(f"the spool's process ended with {code}")
                self._exit_code = self._start()
                is_ours = True
            await trio.sleep(LOOK_INTERVAL)

    async def _dial_present(self) -> trio.SocketStream:
        try:
            return await self._dial()
        except (OSError, trio.TooSlowError) as exc:
            raise SpoolLostError from exc

    async def _dial(self) -> trio.SocketStream:
        """A connection that was greeted back. Raises `OSError`, and `trio.TooSlowError` when it hangs."""
        with trio.fail_after(GREETING_TIMEOUT):
            stream = await trio.open_unix_socket(self._place.socket)
            try:
                await stream.send_all(GREETING + self._identity + b"\n")
                answer = await stream.receive_some(len(SAME) + 1)
            except BaseException as exc:
                await trio.aclose_forcefully(stream)
                if isinstance(exc, trio.BrokenResourceError):
                    raise ConnectionResetError("the spool is ending") from exc
                raise
        if answer != SAME + b"\n":
            await trio.aclose_forcefully(stream)
            raise ConnectionRefusedError("the spool was another's")
        return stream


class Heard:
    """What an answer adds to the text that the user has. Pure."""

    def __init__(self, already_said: str) -> None:
        self._already_said = already_said
        self._known: str | None = None
        """What of the user's text is still to come from the spool; None before its first line."""
        self._new: list[Piece] = []

    def take(self, line: bytes) -> End | Failure | None:
        """Take a line; the end, if it is that. Raises `SpoolLostError` for what cannot be continued."""
        try:
            if self._known is None:
                said = orjson.loads(line)["said"]
                if said > len(self._already_said):
                    raise SpoolLostError
                self._known = self._already_said[said:]
                return None
            piece = decode_line(line)
        except (ValueError, TypeError, KeyError) as exc:
            raise SpoolLostError from exc
        match piece:
            case End() | Failure():
                if self._known and isinstance(piece, End):
                    raise SpoolLostError
                return piece
            case Token(text=text) if self._known:
                here = len(self._known)
                if not (text.startswith(self._known) or self._known.startswith(text)):
                    raise SpoolLostError  # the answer is not the one that the user has the beginning of
                self._known = self._known[len(text) :]
                if text[here:]:
                    self._new.append(Token(text[here:]))
            case None:
                pass
            case _:
                self._new.append(piece)
        return None

    def new_pieces(self) -> list[Piece]:
        """What is new since the last call."""
        new, self._new = self._new, []
        return new


class _Listener:
    """Reads the lines of one answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = LineBuffer()

    async def lines(self) -> list[bytes]:
        """The next lines, at least one. Raises `SpoolLostError` at the end, or after too long a silence."""
        while True:
            try:
                with trio.fail_after(LOST_AFTER):
                    data = await self._stream.receive_some()
                if not data:
                    raise SpoolLostError
                lines = self._buffer.feed(data)
            except (trio.BrokenResourceError, trio.TooSlowError, ValueError) as exc:
                raise SpoolLostError from exc
            if lines:
                return lines


async def _send(stream: trio.SocketStream, message: Mapping[str, Any]) -> None:
    try:
        with trio.fail_after(LOST_AFTER):
            await stream.send_all(orjson.dumps(message) + b"\n")
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as exc:
        raise SpoolLostError from exc


@asynccontextmanager
async def open_spool_link(db: str, settings: AgentSettings) -> AsyncIterator[SpoolLink | None]:
    """A link to the spool of a database, which is looked for or started at once; left at the end.

    None where there can be no spool: for a database that is no file, and on systems without unix sockets.
    """
    path, place = _find_place(db)
    if place is None:
        yield None
        return
    async with trio.open_nursery() as nursery:
        link = SpoolLink(
            place,
            identity(settings.llm_url, settings.llm_key, settings.llm_keep),
            lambda: start_spool(path, settings).exit_code,
            nursery,
        )
        nursery.start_soon(_connect_early, link)
        try:
            yield link
        finally:
            await link.leave()
        nursery.cancel_scope.cancel()


def _find_place(db: str) -> tuple[str, SpoolPlace | None]:
    path = os.path.realpath(db)
    if not os.path.isfile(path) or not hasattr(os, "posix_spawn") or not sys.executable:
        return path, None
    try:
        return path, place_of(path)
    except OSError as exc:
        structlog.get_logger("reference_agent.llm").warning("llm_spool_unavailable", error=str(exc))
        return path, None


async def _connect_early(link: SpoolLink) -> None:
    # So that the first question does not wait for a process to start.
    with suppress(SpoolUnavailableError):
        await link.connect()
