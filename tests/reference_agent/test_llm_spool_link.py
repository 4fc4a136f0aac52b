"""The runtime's side of the spool, over a unix socket to a spool in this process."""

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.brain import Piece, Step, Token, Usage
from gateway.reference_agent.history import Entry
from gateway.reference_agent.llm_brain import LlmBrain
from gateway.reference_agent.llm_client import LlmClient
from gateway.reference_agent.llm_spool import LlmSpool
from gateway.reference_agent.llm_spool_link import (
    Heard,
    SpoolLink,
    SpoolLostError,
)
from gateway.reference_agent.llm_spool_place import SpoolPlace, place_of
from gateway.reference_agent.llm_spool_process import listen
from gateway.reference_agent.llm_spool_protocol import End, encode_lines
from gateway.reference_agent.llm_spool_server import SpoolServer

from .fake_llm import FakeLlm, Reply, chunk, says

STEP = Step("s1", AGENTS["ask"], (Entry("user", "hi", "2026-01-01T00:00:00Z"),), step_id="key 1")


@pytest.fixture
def place(short_folder: Path) -> SpoolPlace:
    """The place of a database."""
    return place_of(str(short_folder / "agent.db"))


class Stage:
    """A brain, its spool in this process, and how often that was started and can be killed."""

    def __init__(self, llm: FakeLlm, place: SpoolPlace, nursery: trio.Nursery) -> None:
        self.llm = llm
        self.starts = 0
        self.identity = b"us"
        self.refuses_to_start = False
        self.exit_code = 0
        self.pieces: list[Piece] = []
        self._place = place
        self._nursery = nursery
        self._running: trio.CancelScope | None = None

    def start(self) -> Callable[[], int | None]:
        """Start a spool."""
        self.starts += 1
        if self.refuses_to_start:
            raise ChildProcessError("no")
        self._running = trio.CancelScope()
        self._nursery.start_soon(self._serve, self.identity, self._running)
        return functools.partial(self._exit_code_of, self._running)

    def _exit_code_of(self, running: trio.CancelScope) -> int | None:
        return self.exit_code if running.cancel_called else None

    async def kill(self) -> None:
        """End the spool as a kill does: at once, and its socket stays."""
        assert self._running is not None
        self._running.cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def say(self, *pieces: Piece) -> None:
        """Keep what the brain says."""
        self.pieces.extend(pieces)

    @property
    def text(self) -> str:
        """What the user was told."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Token))

    @property
    def requests_counted(self) -> int:
        """What the runtime counts as requests."""
        return sum(piece.requests for piece in self.pieces if isinstance(piece, Usage))

    async def _serve(self, identity: bytes, running: trio.CancelScope) -> None:
        with running:
            async with httpx.AsyncClient(transport=self.llm) as http, trio.open_nursery() as calls:
                client = LlmClient(http, "http://llm/v1/chat/completions", key=None, jitter=lambda: 0.0)
                server = SpoolServer(LlmSpool(client, calls, 60), identity, keep=60)
                async with listen(self._place) as listener:
                    await server.serve(listener)
                calls.cancel_scope.cancel()
        running.cancel()


@asynccontextmanager
async def stage_of(llm: FakeLlm, place: SpoolPlace) -> AsyncIterator[tuple[Stage, SpoolLink, LlmBrain]]:
    """A brain with a link to a spool that is started when it is needed."""
    async with trio.open_nursery() as nursery, httpx.AsyncClient(transport=llm) as http:
        stage = Stage(llm, place, nursery)
        link = SpoolLink(place, b"us", stage.start, nursery)
        client = LlmClient(http, "http://llm/v1/chat/completions", key=None, jitter=lambda: 0.0)
        yield stage, link, LlmBrain(client, "m", history_tokens=1000, spool=link)
        await link.leave()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Return once something on the other side of a socket is so."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - there is no event for it here
            await trio.sleep(0.005)


async def test_one_spool_is_started_for_all_who_come_at_once(place: SpoolPlace) -> None:
    """The others wait for it."""
    async with stage_of(FakeLlm(), place) as (stage, link, _), trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(link.connect)
    assert stage.starts == 1


async def test_a_step_is_asked_of_the_spool_and_its_pieces_are_as_without(place: SpoolPlace) -> None:
    """Words, usage, requests."""
    async with stage_of(FakeLlm(says("Hel", "lo")), place) as (stage, _, brain):
        await brain.think(STEP, stage.say)
    assert stage.text == "Hello"
    assert stage.pieces[-1] == Usage(10, 2, requests=0)
    assert (stage.starts, stage.requests_counted) == (1, 1)


async def test_a_step_nobody_can_come_back_for_is_asked_without_the_spool(place: SpoolPlace) -> None:
    """Its call ends with its runtime."""
    async with stage_of(FakeLlm(says("a")), place) as (stage, _, brain):
        await brain.think(Step("s1", STEP.agent, STEP.history), stage.say)
    assert (stage.text, stage.starts) == ("a", 0)


async def test_a_step_that_was_broken_off_is_heard_from_where_it_was(place: SpoolPlace) -> None:
    """The LLM is asked once, and counted once; what the user has is not said again."""
    slow = Reply([*says("one ", "two ", "three ", "four").chunks], delay=0.05)
    async with stage_of(FakeLlm(slow), place) as (stage, _, brain):
        with trio.CancelScope() as scope:

            async def say_until_two(*pieces: Piece) -> None:
                await stage.say(*pieces)
                if "two" in stage.text:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()

            await brain.think(STEP, say_until_two)
        had = stage.text
        stage.pieces.clear()
        resumed = Step(STEP.session_id, STEP.agent, STEP.history, already_said=had, step_id=STEP.step_id)
        await brain.think(resumed, stage.say)
    assert (had, stage.text) == ("one two ", "three four")
    assert (len(stage.llm.requests), stage.requests_counted) == (1, 1)


async def test_releasing_stops_the_call(place: SpoolPlace) -> None:
    """Also in a scope that is cancelled: that is where a stopped turn releases its step."""
    slow = Reply([chunk({"content": "a"})] * 1000, delay=0.02)
    async with stage_of(FakeLlm(slow), place) as (stage, _, brain):
        with trio.move_on_after(0.2):
            try:
                await brain.think(STEP, stage.say)
            finally:
                await brain.release("s1")
        await until(lambda: stage.llm.closed == ["closed"])


@pytest.mark.parametrize(("starts_again", "exit_code"), [(True, -9), (True, 1), (False, -9)])
async def test_when_the_spool_is_lost_the_llm_is_asked_again_with_the_text_so_far(
    place: SpoolPlace, starts_again: bool, exit_code: int
) -> None:
    """By a new spool, or by the runtime itself when there can be none."""
    first = Reply([chunk({"content": "Once "})], delay=0.01)
    first.chunks += [b": thinking\n\n"] * 10_000
    llm = FakeLlm(first, says("upon a time"))
    async with stage_of(llm, place) as (stage, _, brain), trio.open_nursery() as nursery:
        nursery.start_soon(brain.think, STEP, stage.say)
        await until(lambda: stage.text == "Once ")
        stage.refuses_to_start = not starts_again
        stage.exit_code = exit_code
        await stage.kill()
    assert (stage.text, stage.starts) == ("Once upon a time", 2)
    assert stage.llm.bodies[1]["messages"][-2] == {"role": "assistant", "content": "Once "}
    assert stage.requests_counted == 2


async def test_an_answer_that_went_on_from_a_text_is_heard_from_there(place: SpoolPlace) -> None:
    """The spool says how much of the text the answer began behind."""
    async with stage_of(FakeLlm(says("upon ", "a time")), place) as (stage, _, brain):
        for had, expected in (("Once ", "upon a time"), ("Once upon ", "a time")):
            stage.pieces.clear()
            step = Step(STEP.session_id, STEP.agent, STEP.history, already_said=had, step_id=STEP.step_id)
            await brain.think(step, stage.say)
            assert stage.text == expected
    assert len(stage.llm.requests) == 1


async def test_a_spool_of_another_version_is_replaced(place: SpoolPlace) -> None:
    """It ends, and a new one is started."""
    async with stage_of(FakeLlm(says("a")), place) as (stage, _, brain):
        stage.identity = b"older"
        stage.start()
        await until(place.socket.exists)
        stage.identity = b"us"
        await brain.think(STEP, stage.say)
    assert (stage.text, stage.starts) == ("a", 2)


async def test_without_a_spool_the_runtime_asks_the_llm_itself(place: SpoolPlace) -> None:
    """And does not try to start one again for each step."""
    async with stage_of(FakeLlm(says("a"), says("b")), place) as (stage, _, brain):
        stage.refuses_to_start = True
        await brain.think(STEP, stage.say)
        await brain.think(STEP, stage.say)
        await brain.release("s1")
    assert (stage.text, stage.starts) == ("ab", 1)


async def test_a_spool_that_hangs_does_not_hold_up_the_runtime(
    place: SpoolPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections, as the kernel does that for it, and does not greet."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool_link.GREETING_TIMEOUT", 0.1)
    async with stage_of(FakeLlm(says("a")), place) as (stage, _, brain), listen(place):
        await brain.think(STEP, stage.say)
    assert (stage.text, stage.starts) == ("a", 0)


async def test_a_spool_that_falls_silent_is_lost(place: SpoolPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It greets, and then says nothing, not even that it is alive."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool_link.LOST_AFTER", 0.1)

    async def greet_only(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"same\n")
        await trio.sleep_forever()

    async with stage_of(FakeLlm(says("a")), place) as (stage, _, brain), trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, greet_only, [listen(place)])
        await brain.think(STEP, stage.say)
        nursery.cancel_scope.cancel()
    assert (stage.text, stage.starts) == ("a", 0)


async def test_what_the_recorder_raises_is_not_taken_for_a_lost_spool(place: SpoolPlace) -> None:
    """A store that is too slow, for example, fails the step as it does without a spool."""

    async def fail(*pieces: Piece) -> None:
        if any(isinstance(piece, Token) for piece in pieces):
            raise trio.TooSlowError

    async with stage_of(FakeLlm(says("a")), place) as (stage, _, brain):
        with pytest.raises(trio.TooSlowError):
            await brain.think(STEP, fail)
    assert len(stage.llm.requests) == 1


@pytest.mark.parametrize(
    ("had", "lines", "new"),
    [
        ("", [Token("a"), Token("b")], "ab"),
        ("ab", [Token("a"), Token("b"), Token("c")], "c"),
        ("ab", [Token("abc"), Token("d")], "cd"),
        ("abc", [Token("ab"), Token("cd")], "d"),
    ],
)
def test_only_what_is_new_is_said(had: str, lines: list[Token], new: str) -> None:
    """However the text is cut into words."""
    heard = Heard(had)
    heard.take(b'{"said":0}')
    for line in lines:
        assert heard.take(encode_lines(line).rstrip()) is None
    assert "".join(piece.text for piece in heard.new_pieces() if isinstance(piece, Token)) == new
    assert heard.new_pieces() == []


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"said":3}'],
        [b"{}"],
        [b"nonsense"],
        [b'{"said":0}', b"nonsense"],
        [b'{"said":0}', encode_lines(Token("ax")).rstrip()],
        [b'{"said":0}', encode_lines(Token("a")).rstrip(), encode_lines(End()).rstrip()],
    ],
)
def test_an_answer_that_does_not_continue_the_text_is_lost(lines: list[bytes]) -> None:
    """The LLM is then asked again with that text."""
    heard = Heard("ab")
    *good, bad = lines
    assert [heard.take(line) for line in good] == [None] * len(good)
    with pytest.raises(SpoolLostError):
        heard.take(bad)
