"""The way between a supervisor and a worker."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from gateway.config import load_configuration
from gateway.workers.channel import (
    MOST_WAITING,
    Answer,
    Answers,
    Asking,
    Channel,
    Leaving,
    Listening,
    Message,
    Question,
    Setup,
)
from gateway.workers.siblings import ChannelSiblings
from gateway.workers.worker_process import dump_configuration
from gateway.workers.worker_process import load_configuration as load_dumped
from tests.adapters.socket_harness import RecordingTelemetry

EVERY: list[Message] = [
    Setup(1, 4, b"\x80configuration", [3, 4], []),
    Listening(["http://127.0.0.1:8000"]),
    Leaving(),
    Asking(1, "metrics", ""),
    Question(2, "session", "s"),
    Answer(2, None),
    Answer(2, b"\x00\xff" * 200_000),
    Answers(1, {"2": b"page", "supervisor": b""}),
]


def pair() -> tuple[Channel, Channel]:
    """Both sides."""
    one, two = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in (one, two)]
    return Channel(streams[0]), Channel(streams[1])


async def test_messages_arrive_in_order() -> None:
    """Of every kind and of any size, also those that were posted before anybody listened."""
    ours, theirs = pair()
    heard: list[Message] = []
    for message in EVERY:
        ours.post(message)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            def take(message: Message) -> None:
                heard.append(message)
                if len(heard) == len(EVERY):
                    nursery.cancel_scope.cancel()

            nursery.start_soon(ours.run, heard.append)
            nursery.start_soon(theirs.run, take)

    assert heard == EVERY


async def test_its_end_is_noticed() -> None:
    """``run`` returns on one side when the process on the other is gone, whether or not something waits."""
    ours, theirs = pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.run, print)
            with trio.move_on_after(0.05):
                await theirs.run(print)
            ours.post(Leaving())
            await theirs._stream.aclose()


async def test_what_is_no_message_ends_it() -> None:
    """A worker of another version costs itself, and not the supervisor of all."""
    ours, theirs = pair()
    heard: list[Message] = []
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.run, heard.append)
            await theirs._stream.send_all(b"\x00\x00\x00\x08\x81\xa4type\xa1X")
    await theirs._stream.aclose()

    assert heard == []


async def test_keeps_little_for_a_process_that_hangs() -> None:
    """Nothing blocks and nothing grows without bounds."""
    ours, _theirs = pair()
    for _ in range(3 * MOST_WAITING):
        ours.post(Answer(1, None))

    assert ours._outgoing.statistics().current_buffer_used == MOST_WAITING
    await ours._stream.aclose()
    await _theirs._stream.aclose()


def test_a_worker_gets_the_configuration_as_it_is() -> None:
    """Every setting, bind and source, whatever the files say by then."""
    configuration = load_configuration(
        {"GATEWAY__TRUSTED_PROXIES": "10.0.0.0/8,::1", "GATEWAY__ALLOWED_ORIGINS": "https://a.example"},
        dotenv=None,
        bind="127.0.0.1:1",
    )

    assert load_dumped(dump_configuration(configuration)) == configuration


# --------------------------------------------------------------------------- siblings


class Recorder(Channel):
    """A channel whose other side is the test."""

    def __init__(self) -> None:
        self.posted: list[Message] = []

    def post(self, message: Message) -> None:
        """Remember it."""
        self.posted.append(message)


@asynccontextmanager
async def siblings() -> AsyncIterator[tuple[ChannelSiblings, Recorder, RecordingTelemetry]]:
    """Of worker 1 of 3."""
    recorder, telemetry = Recorder(), RecordingTelemetry()
    await trio.lowlevel.checkpoint()
    yield ChannelSiblings(recorder, telemetry, number=1, count=3), recorder, telemetry


async def test_asks_and_is_answered() -> None:
    """Each question gets its own answers, in whatever order they come."""
    async with siblings() as (ours, recorder, _):
        found: dict[str, object] = {}

        async def ask(about: str) -> None:
            found[about] = await ours.ask("session", about)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, "b")
            await trio.testing.wait_all_tasks_blocked()
            assert recorder.posted == [Asking(1, "session", "a"), Asking(2, "session", "b")]
            ours.take(Answers(2, {"3": b"B"}))
            ours.take(Answers(1, {}))

        assert found == {"a": {}, "b": {"3": b"B"}}


async def test_does_not_wait_for_a_supervisor_that_hangs(autojump_clock: trio.testing.MockClock) -> None:
    """Two seconds, then there are no answers; one that comes later is nobody's."""
    async with siblings() as (ours, _, _):
        started = trio.current_time()
        assert await ours.ask("metrics") == {}
        assert trio.current_time() - started == 2.0
        ours.take(Answers(1, {"2": b"late"}))


@pytest.mark.parametrize(
    ("question", "answer"), [("known", b"of s"), ("unknown", None), ("broken", None), ("nothing", None)]
)
async def test_answers_what_it_can(question: str, answer: bytes | None) -> None:
    """And says so when it cannot: a crash is contained, logged and counted."""
    async with siblings() as (ours, recorder, telemetry):

        def fail(about: str) -> bytes:
            raise ValueError(about)

        ours.answer("known", lambda about: b"of " + about.encode())
        ours.answer("nothing", lambda _: None)
        ours.answer("broken", fail)
        ours.take(Question(9, question, "s"))

        assert recorder.posted == [Answer(9, answer)]
        assert telemetry.errors == (["question_crashed"] if question == "broken" else [])
