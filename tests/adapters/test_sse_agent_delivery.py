"""The stream of an answer given to a function, as it arrives, over a real connection."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.sse_agent import SseAgentStream
from gateway.adapters.streaming_transport import RECEIVE_BODY, RECEIVE_EACH, StreamingTransport
from gateway.core.errors import AgentProtocolError, AgentStreamInterrupted, AgentTimeout
from gateway.core.sse import ServerSentEvent
from tests.adapters.agent_harness import END, HEAD, Handler, chunk, loopback_agent, read_request


@asynccontextmanager
async def stream_of(
    handler: Handler, *, silence: float = 10, max_event_bytes: int = 4096
) -> AsyncIterator[tuple[SseAgentStream, StreamingTransport]]:
    """A stream whose runtime is ``handler``, and the transport below it."""

    async def serve(connection: trio.SocketStream) -> None:
        while request := await read_request(connection):
            await handler(connection, request)

    transport = StreamingTransport()
    async with loopback_agent(serve) as port:
        client = httpx.AsyncClient(transport=transport, timeout=silence)
        async with client, client.stream("POST", f"http://127.0.0.1:{port}/", content=b"{}") as response:
            receive = response.extensions[RECEIVE_BODY]
            assert RECEIVE_EACH in response.extensions
            yield SseAgentStream(response, receive, max_event_bytes), transport


def event(data: str) -> bytes:
    """One event as a chunk."""
    return chunk(f"data: {data}\n\n".encode())


class Taken:
    """Keeps what it is given; has enough after ``enough`` events."""

    def __init__(self, enough: int = 10**9) -> None:
        self.data: list[str] = []
        self.tasks: set[str] = set()
        self._enough = enough

    def __call__(self, batch: Sequence[ServerSentEvent]) -> bool:
        """Called by the stream."""
        assert batch
        self.data += [sse.data.decode() for sse in batch]
        self.tasks.add(trio.lowlevel.current_task().name)
        return len(self.data) < self._enough


@pytest.mark.parametrize("seed", range(5))
async def test_every_event_is_given_once_and_in_order_however_it_is_cut(seed: int) -> None:
    """Over reads of any size, and with the end in the last of them; the connection can be used again."""
    dice = random.Random(seed)
    answer = HEAD + b"".join(event(str(number)) for number in range(300)) + END

    async def answer_in_pieces(connection: trio.abc.Stream, _request: bytes) -> None:
        at = 0
        while at < len(answer):
            size = dice.choice([1, 7, 40, 500, 5000])
            await connection.send_all(answer[at : at + size])
            at += size
            if dice.random() < 0.3:
                await trio.lowlevel.checkpoint()

    async with stream_of(answer_in_pieces) as (stream, transport):
        taken = Taken()
        assert await stream.deliver(taken) is True
        assert taken.data == [str(number) for number in range(300)]
        assert transport.idle_connections == 1


async def test_tokens_that_come_one_by_one_take_no_task_switch() -> None:
    """After the first, the function is called from the task that waits for all streams."""
    taken = Taken()
    given = trio.Event()

    async def one_by_one(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD)
        for number in range(5):
            await connection.send_all(event(str(number)))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(taken.data) == number + 1
        given.set()
        await connection.send_all(END)

    async with stream_of(one_by_one) as (stream, _):
        assert await stream.deliver(taken) is True
        assert given.is_set()
        assert "readiness" in taken.tasks


async def test_who_has_enough_is_given_the_rest_by_the_next_call() -> None:
    """Backpressure: nothing is read meanwhile, nothing is lost."""

    async def answer(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD)
        for number in range(4):
            await connection.send_all(event(str(number)))
            await trio.testing.wait_all_tasks_blocked(0.01)
        await connection.send_all(END)

    async with stream_of(answer) as (stream, _):
        first, second = Taken(enough=2), Taken()
        assert await stream.deliver(first) is False
        assert first.data == ["0", "1"]
        await trio.sleep(0.05)
        assert await stream.deliver(second) is True
        assert second.data == ["2", "3"]


async def test_a_cut_is_told_after_all_that_came_before_it() -> None:
    """As ``receive`` does."""

    async def cut(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD + event("0"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        await connection.send_all(event("1"))
        await connection.aclose()

    async with stream_of(cut) as (stream, transport):
        taken = Taken()
        with pytest.raises(AgentStreamInterrupted):
            await stream.deliver(taken)
        assert taken.data == ["0", "1"]
        assert transport.open_connections == 0


async def test_silence_is_counted_from_the_last_that_came() -> None:
    """Not from when the function was first to be called."""

    async def fall_silent(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD)
        for number in range(4):
            await connection.send_all(event(str(number)))
            await trio.sleep(0.1)
        await trio.sleep_forever()

    with trio.fail_after(5):
        async with stream_of(fall_silent, silence=0.25) as (stream, transport):
            taken = Taken()
            started = trio.current_time()
            with pytest.raises(AgentTimeout):
                await stream.deliver(taken)
            assert taken.data == ["0", "1", "2", "3"]
            assert trio.current_time() - started >= 0.5
            assert transport.open_connections == 0


async def test_an_event_over_the_limit_is_refused() -> None:
    """However it arrives."""

    async def large(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD + event("0"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        await connection.send_all(event("x" * 5000))
        await trio.sleep_forever()

    async with stream_of(large) as (stream, _):
        taken = Taken()
        with pytest.raises(AgentProtocolError):
            await stream.deliver(taken)
        assert taken.data == ["0"]


async def test_a_bug_in_the_function_is_raised_where_it_was_given() -> None:
    """In the turn's own branch, which contains it; the connection is closed."""

    async def answer(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD + event("0"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        await connection.send_all(event("1"))
        await trio.sleep_forever()

    def take(batch: Sequence[ServerSentEvent]) -> bool:
        if batch[0].data == b"1":
            raise ZeroDivisionError
        return True

    async with stream_of(answer) as (stream, transport):
        with pytest.raises(ZeroDivisionError):
            await stream.deliver(take)
        assert transport.open_connections == 0


async def test_after_a_cancel_nothing_is_given_any_more() -> None:
    """From that very moment, although the bytes are there; the connection is closed."""
    scope = trio.CancelScope()
    taken = Taken()

    async def answer(connection: trio.abc.Stream, _request: bytes) -> None:
        await connection.send_all(HEAD + event("0"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert isinstance(connection, trio.SocketStream)
        os.write(connection.socket.fileno(), event("1"))  # without a checkpoint before the cancel
        scope.cancel()
        await trio.sleep_forever()

    async with stream_of(answer) as (stream, transport):
        with scope:
            await stream.deliver(taken)
        assert scope.cancelled_caught
        assert taken.data == ["0"]
        assert transport.open_connections == 0
