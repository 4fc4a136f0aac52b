"""The LLM spool's connections: greets runtimes, answers them, and knows when nobody needs it any more."""

import functools
from collections.abc import Callable

import orjson
import structlog
import trio

from gateway.reference_agent.llm_spool import HeldAnswer, LlmSpool
from gateway.reference_agent.llm_spool_protocol import (
    ALIVE_INTERVAL,
    GREETING,
    OTHER,
    SAME,
    Ask,
    LineBuffer,
)

GREETING_TIMEOUT = 5.0
"""Seconds a connection may take to say who it is."""


class SpoolServer:
    """Serves one `LlmSpool` to the runtimes of one identity.

    Error handling: what goes wrong in a connection ends that connection.
    """

    def __init__(
        self,
        spool: LlmSpool,
        identity: bytes,
        *,
        keep: float,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        self._spool = spool
        self._identity = identity
        self._keep = keep
        self._on_left = on_left
        self._connections = 0
        self._alone_since = trio.current_time()
        self._said_bye = False
        self._replaced = False
        self._changed = trio.lowlevel.ParkingLot()
        self._log = structlog.get_logger("reference_agent.llm")

    async def serve(self, listener: trio.abc.Listener[trio.abc.HalfCloseableStream]) -> None:
        """Serve until nobody needs this spool any more, then close the listener and every connection.

        That is: a runtime of another identity came; or no runtime is connected and no answer is held, and the
        last runtime said that it ends or has been gone for ``keep`` seconds.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                functools.partial(
                    trio.serve_listeners, self._serve_connection, [listener], handler_nursery=nursery
                )
            )
            nursery.start_soon(self._watch_spool)
            await self._wait_not_needed()
            nursery.cancel_scope.cancel()

    async def _wait_not_needed(self) -> None:
        while not self._replaced:
            if self._connections or len(self._spool):
                await self._changed.park()
                continue
            if self._said_bye:
                return
            with trio.move_on_at(self._alone_since + self._keep) as waiting:
                await self._changed.park()
            if waiting.cancelled_caught:
                return

    async def _watch_spool(self) -> None:
        while True:
            await self._spool.wait_let_go()
            self._changed.unpark_all()

    async def _serve_connection(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._connections += 1
        self._changed.unpark_all()
        try:
            await self._converse(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the runtime was killed
        except* Exception:
            self._log.exception("spool_connection_failed")
        finally:
            self._connections -= 1
            if not self._connections:
                self._alone_since = trio.current_time()
                self._on_left()
            self._changed.unpark_all()
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.abc.HalfCloseableStream) -> None:
        buffer = LineBuffer()
        lines: list[bytes] = []
        with trio.move_on_after(GREETING_TIMEOUT):
            while not lines and (data := await stream.receive_some()):
                lines = buffer.feed(data)
        if not lines:
            return
        if lines.pop(0) != GREETING + self._identity:
            await stream.send_all(OTHER + b"\n")
            self._replaced = True
            return
        self._said_bye = False
        await stream.send_all(SAME + b"\n")
        async with trio.open_nursery() as nursery:
            while True:
                for line in lines:
                    self._obey(orjson.loads(line), stream, nursery)
                data = await stream.receive_some()
                if not data:
                    break
                lines = buffer.feed(data)
            nursery.cancel_scope.cancel()

    def _obey(
        self,
        message: dict[str, dict[str, object]],
        stream: trio.abc.HalfCloseableStream,
        nursery: trio.Nursery,
    ) -> None:
        match message:
            case {"ask": fields}:
                answer = self._spool.open(Ask(**fields))  # type: ignore[arg-type]
                nursery.start_soon(self._tell, stream, answer)
            case {"release": {"session_id": str(session_id), "question": str(question)}}:
                self._spool.release(session_id, question)
            case {"bye": _}:
                self._said_bye = True
            case _:
                raise ValueError("not a message of a runtime")

    async def _tell(self, stream: trio.abc.HalfCloseableStream, answer: HeldAnswer) -> None:
        with answer.being_read():
            await stream.send_all(orjson.dumps({"said": answer.said}) + b"\n")
            told = 0
            while True:
                data = b"\n"
                with trio.move_on_after(ALIVE_INTERVAL):
                    data, told = await answer.next_lines(told)
                await stream.send_all(data)
                if not data:
                    break
        await stream.send_eof()
