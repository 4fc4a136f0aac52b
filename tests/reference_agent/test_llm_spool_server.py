"""The spool's connections, over streams in memory and in virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
import trio.testing

from gateway.reference_agent.brain import Token
from gateway.reference_agent.llm_spool import LlmSpool
from gateway.reference_agent.llm_spool_protocol import ALIVE_INTERVAL, End, decode_line
from gateway.reference_agent.llm_spool_server import GREETING_TIMEOUT, SpoolServer

from .test_llm_spool import KEEP, Counting

Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


class Door(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """A listener whose clients come from this process."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Stream](10)

    async def connect(self) -> Stream:
        """A new connection."""
        ours, theirs = trio.testing.memory_stream_pair()
        await self._send.send(theirs)
        return ours

    async def accept(self) -> trio.abc.HalfCloseableStream:
        """The next connection."""
        return await self._receive.receive()

    async def aclose(self) -> None:
        """Nothing is held."""
        await trio.lowlevel.checkpoint()


class Spool:
    """A running spool and what can be seen of it."""

    def __init__(self, door: Door, asker: Counting) -> None:
        self.door = door
        self.asker = asker
        self.ended_at: float | None = None
        self.left: list[float] = []

    async def runtime(self, greeting: bytes = b"gateway-llm-spool us\n") -> Stream:
        """A connection that has greeted."""
        stream = await self.door.connect()
        await stream.send_all(greeting)
        return stream

    async def ask(self, to: int, session_id: str = "s1") -> Stream:
        """A connection that has asked."""
        stream = await self.runtime()
        ask = {"session_id": session_id, "question": "q", "agent": "ask", "said": 7, "body": {"to": to}}
        await send(stream, {"ask": ask})
        return stream


async def send(stream: Stream, message: dict[str, Any]) -> None:
    """Send one line."""
    await stream.send_all(orjson.dumps(message) + b"\n")


async def receive_all(stream: Stream) -> bytes:
    """Everything until the other side closes."""
    return b"".join([bytes(data) async for data in stream])


@asynccontextmanager
async def running_spool() -> AsyncIterator[Spool]:
    """A spool that answers to the identity ``us``."""
    running = Spool(Door(), Counting())

    async def serve() -> None:
        async with trio.open_nursery() as calls:
            server = SpoolServer(
                LlmSpool(running.asker, calls, KEEP),
                b"us",
                keep=KEEP,
                on_left=lambda: running.left.append(trio.current_time()),
            )
            await server.serve(running.door)
            calls.cancel_scope.cancel()
        running.ended_at = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield running
        nursery.cancel_scope.cancel()


async def test_an_answer_is_told_from_its_beginning_to_its_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Greeting, what the user had when it was asked for, the lines; then the connection is closed."""
    async with running_spool() as spool:
        greeting, said, *lines = (await receive_all(await spool.ask(2))).splitlines()
    assert (greeting, orjson.loads(said)) == (b"same", {"said": 7})
    assert [decode_line(line) for line in lines] == [Token("0 "), Token("1 "), End()]


async def test_a_broken_connection_is_no_cancel(autojump_clock: trio.testing.MockClock) -> None:
    """Somebody comes back and hears all of the one answer."""
    async with running_spool() as spool:
        stream = await spool.ask(10)
        await trio.sleep(3.5)
        await stream.aclose()
        await trio.sleep(3)
        received = await receive_all(await spool.ask(10))
    assert received.count(b"Token") == 10
    assert (spool.asker.asked, spool.asker.stopped) == (["s1 ask 10"], [])


async def test_a_release_is_one(autojump_clock: trio.testing.MockClock) -> None:
    """On whichever connection it comes."""
    async with running_spool() as spool:
        stream = await spool.ask(10)
        presence = await spool.runtime()
        await trio.sleep(3.5)
        await send(presence, {"release": {"session_id": "s1", "question": "q"}})
        received = await receive_all(stream)
    assert received.count(b"Token") == 3
    assert b"End" not in received
    assert spool.asker.stopped == [("s1", 3.5)]


async def test_silence_is_filled_with_signs_of_life(autojump_clock: trio.testing.MockClock) -> None:
    """So that a spool that hangs can be told from an LLM that thinks."""
    async with running_spool() as spool:
        stream = await spool.runtime()
        await receive_some(stream)
        spool.asker.pause = 3.5 * ALIVE_INTERVAL
        ask = {"session_id": "s1", "question": "q", "agent": "ask", "said": 0, "body": {"to": 1}}
        await send(stream, {"ask": ask})
        lines = (await receive_all(stream)).splitlines()
    assert [len(line) > 0 for line in lines] == [True, False, False, False, True, True]


async def receive_some(stream: Stream) -> bytes:
    """What comes next."""
    return bytes(await stream.receive_some())


async def test_a_runtime_of_another_version_ends_it(autojump_clock: trio.testing.MockClock) -> None:
    """At once, with all that it holds: the newcomer starts its own."""
    async with running_spool() as spool:
        stream = await spool.ask(10)
        await trio.sleep(2.5)
        other = await spool.runtime(b"gateway-llm-spool another\n")
        assert await receive_all(other) == b"other\n"
        assert b"End" not in await receive_all(stream)
        await trio.sleep(1)
        assert spool.ended_at == 2.5


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n"[:5], b"gateway-llm-spool us"])
async def test_who_does_not_greet_is_let_go(autojump_clock: trio.testing.MockClock, said: bytes) -> None:
    """In time, and nobody else notices."""
    async with running_spool() as spool:
        presence = await spool.runtime()
        stream = await spool.door.connect()
        if said:
            await stream.send_all(said)
        assert await receive_all(stream) == b""
        assert trio.current_time() == GREETING_TIMEOUT
        assert spool.ended_at is None
        await presence.aclose()


@pytest.mark.parametrize("line", [b"{", b"7", b'{"ask":{"session_id":"s1"}}'])
async def test_nonsense_ends_its_own_connection(autojump_clock: trio.testing.MockClock, line: bytes) -> None:
    """And no other."""
    async with running_spool() as spool:
        asking = await spool.ask(3)
        stream = await spool.runtime()
        await stream.send_all(line + b"\n")
        assert await receive_all(stream) == b"same\n"
        assert (await receive_all(asking)).count(b"End") == 1


async def test_it_ends_with_a_runtime_that_ends_as_it_should(autojump_clock: trio.testing.MockClock) -> None:
    """At once, as it holds nothing."""
    async with running_spool() as spool:
        presence = await spool.runtime()
        await trio.sleep(5)
        await send(presence, {"bye": True})
        await presence.aclose()
        await trio.sleep(1)
    assert (spool.ended_at, spool.left) == (5, [5])


async def test_an_answer_in_flight_is_kept_for_the_next_start(autojump_clock: trio.testing.MockClock) -> None:
    """It ends then with the runtime that has fetched and released it."""
    async with running_spool() as spool:
        presence, asking = await spool.runtime(), await spool.ask(10)
        await trio.sleep(3.5)
        await send(presence, {"bye": True})
        await asking.aclose()
        await presence.aclose()
        await trio.sleep(KEEP - 1)
        assert spool.ended_at is None
        presence = await spool.runtime()
        async with await spool.ask(10) as asking:
            assert (await receive_all(asking)).count(b"Token") == 10
        await send(presence, {"release": {"session_id": "s1", "question": "q"}})
        await trio.sleep(2 * KEEP)
        assert spool.ended_at is None
        await send(presence, {"bye": True})
        await presence.aclose()
        await trio.sleep(1)
    assert spool.ended_at == 3.5 + KEEP - 1 + 2 * KEEP
    assert len(spool.asker.asked) == 1


@pytest.mark.parametrize("to", [0, 3, 100_000])
async def test_it_ends_in_time_when_the_runtime_was_killed_for_good(
    autojump_clock: trio.testing.MockClock, to: int
) -> None:
    """Whether it holds nothing, a complete answer or one in flight, which is stopped."""
    async with running_spool() as spool:
        presence = await spool.runtime()
        asking = await spool.ask(to) if to else presence
        await trio.sleep(10)
        await asking.aclose()
        await presence.aclose()
        await trio.sleep(2 * KEEP)
    assert spool.ended_at == 10 + KEEP


async def test_it_ends_when_no_runtime_ever_comes(autojump_clock: trio.testing.MockClock) -> None:
    """The one that started it was killed before it could connect."""
    async with running_spool() as spool:
        await trio.sleep(2 * KEEP)
    assert spool.ended_at == KEEP
