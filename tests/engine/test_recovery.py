"""Durable sessions over the engine: nothing shown before it is stored, nothing lost by a crash."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from gateway.core.limits import Limits
from gateway.core.storage import StoredSession
from gateway.core.websocket_protocol import Dialect
from gateway.ports import ResumePoint, TurnRequest
from tests.engine.fakes import (
    Bench,
    DurableMemoryStore,
    FakeAgent,
    FakeConnection,
    FakeStream,
    user_message,
)

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock


def seqs(socket: FakeConnection) -> list[int]:
    """The seqs of everything received, in order."""
    return [item["seq"] for item in socket.objects() if "seq" in item]


async def test_nothing_is_shown_or_acked_before_the_store_has_it(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """With a commit of 1 s: the ack after one, the POST not before, tokens after one more."""
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket = bench.connect(dialect=V2)
    await socket.wait_for("welcome")
    await trio.sleep(5)
    store.latency = 1.0
    started = trio.current_time()
    socket.say(user_message(id="m"))
    await socket.wait_for("ack")
    assert trio.current_time() - started == pytest.approx(1)
    stream = await bench.agent.stream(0)
    stream.token("a")
    stream.token("b")
    await socket.wait_for("assistant_message", 1)
    assert trio.current_time() - started == pytest.approx(2)


async def test_a_store_that_is_away_refuses_new_work_and_comes_back(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """STORE_UNAVAILABLE at once and retryable; after its return everything held back goes out in order."""
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket, old = bench.connect(dialect=V2), bench.connect()
    socket.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    await trio.sleep(1)
    store.down = True
    stream.token("a")
    socket.say(user_message(id="m2"))
    old.say(user_message())
    nack = await socket.wait_for("nack")
    error = await old.wait_for("error")
    assert (nack["code"], nack["retryable"]) == ("STORE_UNAVAILABLE", True)
    assert error["code"] in ("STORE_DELAYED", "STORE_UNAVAILABLE")
    await trio.sleep(30)
    assert "assistant_message" not in socket.types()
    store.down = False
    returned = trio.current_time()
    await socket.wait_for("assistant_message")
    assert trio.current_time() - returned <= 2
    socket.say(user_message(id="m2"))
    answer = await socket.wait_for("ack", 2)
    assert answer["status"] in ("accepted", "duplicate")


async def test_after_a_crash_queue_ledger_and_decisions_are_as_acked(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The next process: outcome_unknown, the queued message runs, repeats are duplicates."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket = before.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await before.agent.stream(0)
    stream.token("half")
    await socket.wait_for("assistant_message")
    socket.say(user_message("two", id="m2"))
    await socket.wait_for("ack", 2)
    epoch, seen = socket.objects()[0]["epoch"], max(seqs(socket))
    store.down = True  # from here on the first process can change nothing any more
    store = _copy(store)
    after = await Bench(nursery, store=store).start()
    second = await after.agent.stream(0)
    assert b"two" in second.request.message
    back = after.connect(dialect=V2, resume=ResumePoint(epoch, seen))
    ended = await back.wait_for("turn_ended")
    assert back.objects()[0]["resumed"] is True
    assert ended["outcome"] == "outcome_unknown"
    assert (await back.wait_for("error"))["code"] == "OUTCOME_UNKNOWN"
    back.say(user_message(id="m1"))
    assert (await back.wait_for("ack"))["status"] == "duplicate"


async def test_a_resumable_turn_is_carried_on_after_a_crash(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The next process asks the runtime to continue after the last stored event; the text is whole."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    before.agent.resumable = True
    await store.claim("s", "anonymous", 0)
    socket = before.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await before.agent.stream(0)
    stream.token("a", event_id="1")
    stream.token("b", event_id="2")
    await socket.wait_for("assistant_message", 2)
    epoch = socket.objects()[0]["epoch"]
    store.down = True
    after = Bench(nursery, store=_copy(store))
    after.agent.resumable = True
    await after.start()
    carried = await after.agent.stream(0)
    assert (carried.request.turn_id, carried.request.last_event_id) == (stream.request.turn_id, "2")
    carried.token("c", final=True, event_id="3")
    carried.done()
    back = after.connect(dialect=V2, resume=ResumePoint(epoch, 2))
    ended = await back.wait_for("turn_ended")
    assert (ended["outcome"], back.text()) == ("completed", "bc")


async def test_a_drained_gateway_leaves_what_it_did_not_send_to_the_next(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A turn that waited for a place is sent by the next process, as if for the first time; it is."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store, limits=Limits(max_concurrent_turns=1)).start()
    sockets = {}
    for session_id in ("one", "two"):
        await store.claim(session_id, "anonymous", 0)
        sockets[session_id] = before.connect(session_id, dialect=V2)
        sockets[session_id].say(user_message(session_id, id="m"))
        await sockets[session_id].wait_for("turn_started")
    await before.agent.stream(0)
    await before.hub.drain()
    outcomes = [labels for name, labels in before.telemetry.counts if name == "gateway_turns_total"]
    assert outcomes == [(("outcome", "moved"),)]
    store.down = True
    after = await Bench(nursery, store=_copy(store)).start()

    sent = await after.agent.stream(0)
    assert b"two" in sent.request.message
    sent.done()
    resume = ResumePoint(sockets["two"].objects()[0]["epoch"], 1)
    back = after.connect("two", dialect=V2, resume=resume)
    assert (await back.wait_for("turn_ended"))["outcome"] == "completed"
    assert "turn_started" not in back.types()
    cut = after.connect("one", dialect=V2, resume=ResumePoint(sockets["one"].objects()[0]["epoch"], 1))
    assert (await cut.wait_for("turn_ended"))["outcome"] == "outcome_unknown"
    assert len(after.agent.streams) == 1


async def test_what_was_left_unsent_is_not_sent_by_a_task_that_was_on_its_way(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Its place came free as the drain began, and the way to the runtime need not wait for anything."""
    agent = HastyAgent()
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store, agent=agent, limits=Limits(max_concurrent_turns=1)).start()
    for session_id in ("one", "two"):
        await store.claim(session_id, "anonymous", 0)
        socket = bench.connect(session_id, dialect=V2)
        socket.say(user_message(id="m"))
        await socket.wait_for("turn_started")
    await agent.stream(0)
    two = bench.hub.runners["two"]
    bench.hub._run_turn._places.release()  # type: ignore[attr-defined]
    two.suspend()
    await trio.sleep(1)

    assert len(agent.streams) == 1
    assert (await store.load("two")).record.unsent  # type: ignore[union-attr]


class HastyAgent(FakeAgent):
    """Has the message before anything could be cancelled."""

    @asynccontextmanager
    async def open_stream(self, request: TurnRequest) -> AsyncIterator[FakeStream]:
        """No checkpoint on the way."""
        stream = FakeStream(request, resumable=False)
        self.streams.append(stream)
        self._opened.unpark_all()
        yield stream


async def test_what_an_earlier_process_sent_is_never_taken_for_unsent(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A turn that waits for a place to be resumed, and is drained again, is resumed by the third process."""
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store).start()
    bench.agent.resumable = True
    for number, session_id in enumerate(("one", "two")):
        await store.claim(session_id, "anonymous", 0)
        socket = bench.connect(session_id, dialect=V2)
        socket.say(user_message(id="m"))
        stream = await bench.agent.stream(number)
        stream.token("a", event_id="1")
        await socket.wait_for("assistant_message")
    store.down, store = True, _copy(store)
    bench = Bench(nursery, store=store, limits=Limits(max_concurrent_turns=1))
    bench.agent.resumable = True
    await bench.start()
    await bench.agent.stream(0)
    await bench.hub.drain()
    store.down, store = True, _copy(store)
    bench = Bench(nursery, store=store)
    bench.agent.resumable = True
    await bench.start()

    resumed = [await bench.agent.stream(number) for number in range(2)]
    assert [stream.request.last_event_id for stream in resumed] == ["1", "1"]


async def test_a_turn_without_events_yet_is_carried_on_from_its_own_beginning(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The event id of the turn before it, which the store held, is not taken for one of its own."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    before.agent.resumable = True
    await store.claim("s", "anonymous", 0)
    socket = before.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    first = await before.agent.stream(0)
    first.token("a", final=True, event_id="1")
    first.done()
    await socket.wait_for("turn_ended")
    socket.say(user_message(id="m2"))
    second = await before.agent.stream(1)
    # Anything that has the session stored while the runtime still thinks.
    socket.say(user_message(id="m3"))
    await socket.wait_for("ack", 3)
    store.down = True
    after = Bench(nursery, store=_copy(store))
    after.agent.resumable = True
    await after.start()
    carried = await after.agent.stream(0)
    assert carried.request.turn_id == second.request.turn_id
    assert carried.request.last_event_id is None


async def test_v1_after_a_crash_sees_no_token_twice_and_its_open_call_again(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """What had arrived is unknown for v1: whole events may repeat, tokens never."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket = before.connect()
    socket.say(user_message())
    stream = await before.agent.stream(0)
    stream.token("a")
    stream.emit({"type": "tool_call", "call_id": "c", "tool_name": "t", "arguments": {}})
    stream.done()
    await socket.wait_for("tool_call")
    await trio.sleep(1)
    after = await Bench(nursery, store=_copy(store)).start()
    back = after.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert back.types() == ["tool_call"]


async def test_v1_after_a_crash_is_not_asked_again_what_was_decided(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """An approved call is open until its result comes, and still not shown as one to approve."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket = before.connect()
    socket.say(user_message())
    stream = await before.agent.stream(0)
    call = {"type": "tool_call", "tool_name": "t", "arguments": {}, "requires_approval": True}
    stream.emit({**call, "call_id": "decided"}, {**call, "call_id": "open"})
    stream.done()
    await socket.wait_for("tool_call", 2)
    socket.say({"type": "hitl_decision", "call_id": "decided", "decision": "approve"})
    (await before.agent.stream(1)).done()
    await trio.sleep(1)
    after = await Bench(nursery, store=_copy(store)).start()
    back = after.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert [item["call_id"] for item in back.objects()] == ["open"]


def _copy(store: DurableMemoryStore) -> DurableMemoryStore:
    """The store as the next process finds it."""

    found = DurableMemoryStore()
    found.__dict__.update(
        copy.deepcopy({k: v for k, v in store.__dict__.items() if k not in ("down", "latency")})
    )
    return found


async def test_a_session_that_was_being_loaded_when_the_drain_began_sends_nothing_either(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Stopped in the middle of its start, a process leaves what waits to the next one."""

    class SlowToLoad(DurableMemoryStore):
        async def load(self, session_id: str) -> StoredSession | None:
            await trio.sleep(1)
            return await super().load(session_id)

    store = DurableMemoryStore()
    before = await Bench(nursery, store=store, limits=Limits(max_concurrent_turns=1)).start()
    for session_id in ("one", "two"):
        await store.claim(session_id, "anonymous", 0)
        socket = before.connect(session_id, dialect=V2)
        socket.say(user_message(session_id, id="m"))
        await socket.wait_for("turn_started")
    await before.hub.drain()
    store.down, slow = True, SlowToLoad()
    vars(slow).update(vars(_copy(store)))
    during = Bench(nursery, store=slow)
    nursery.start_soon(during.start)
    await trio.sleep(1.5)
    await during.hub.drain()
    await trio.sleep(5)
    assert during.agent.streams == []

    slow.down = True
    after = await Bench(nursery, store=_copy(slow)).start()
    assert b"two" in (await after.agent.stream(0)).request.message
