"""Several hubs on one real Redis, as nodes of one gateway: who runs what, and what becomes of a turn."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from attrs import frozen

from gateway.adapters.stores.redis import RedisStore, open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.core.websocket_protocol import Dialect
from gateway.ports import ResumePoint
from tests.conformance.session_store import RecordingTelemetry
from tests.engine.fakes import Bench, FakeAgent, FakeConnection, user_message
from tests.engine.test_multiplexed import open_multiplexed
from tests.redis_groups import AnyRedis
from tests.tracing_fake import CALLER

V2 = Dialect.V2_JSON
LEASE = 0.4


@pytest.fixture(params=["shared_redis", "shared_cluster"])
def redis_server(request: pytest.FixtureRequest) -> AnyRedis:
    """A Redis of each kind that carries letters in its own way, empty."""
    servers: AnyRedis = request.getfixturevalue(request.param)
    servers.empty()
    return servers


@frozen
class Node:
    """One hub with its store; ``crash`` cuts it as ``kill -9`` does, without a word to anybody."""

    bench: Bench
    store: RedisStore
    life: trio.CancelScope

    def crash(self) -> None:
        """End it."""
        self.life.cancel()


@asynccontextmanager
async def nodes(
    server: AnyRedis, agent: FakeAgent, *names: str, lease: float = LEASE
) -> AsyncIterator[list[Node]]:
    """Hubs on that Redis that ask the same runtime. They say that they live each quarter of the lease."""
    async with trio.open_nursery() as nursery:
        found = [await nursery.start(_live, server, agent, name, lease) for name in names]
        with trio.fail_after(15):
            yield found
        nursery.cancel_scope.cancel()


async def _live(
    server: AnyRedis, agent: FakeAgent, name: str, lease: float, *, task_status: trio.TaskStatus[Node]
) -> None:
    with trio.CancelScope() as life:
        async with (
            open_redis_store(
                parse_redis_url(server.url),
                full_sync=False,
                dedupe_window=1000.0,
                retention=1000.0,
                telemetry=RecordingTelemetry(),
                lease_seconds=lease,
            ) as store,
            trio.open_nursery() as nursery,
        ):
            bench = await Bench(nursery, store=store, agent=agent, name=name).start()
            task_status.started(Node(bench, store, life))
            await trio.sleep_forever()


async def claimed(node: Node, session_id: str = "s") -> None:
    """Admission does this before a socket is served."""
    await node.store.claim(session_id, "", 1.0)


def seqs(*sockets: FakeConnection) -> list[int]:
    """The seqs of everything received, over one socket after the other."""
    found: list[int] = []
    for socket in sockets:
        for item in socket.objects():
            if "seq" in item and item["type"] != "snapshot":
                found += range(int(item.get("first_seq", item["seq"])), int(item["seq"]) + 1)
    return found


def resume_of(socket: FakeConnection) -> ResumePoint:
    """Where that socket's client has to go on."""
    return ResumePoint(str(socket.objects()[0]["epoch"]), seqs(socket)[-1])


async def test_a_dead_nodes_turn_is_carried_on_by_another(redis_server: AnyRedis) -> None:
    """Noticed within the lease; the stream is resumed after its last stored event, no client misses any."""
    agent = FakeAgent()
    agent.resumable = True
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        socket.say(user_message(id="m"))
        stream = await agent.stream(0)
        stream.token("Hel", event_id="1")
        stream.token("lo", event_id="2")
        await socket.wait_for("assistant_message", 2)
        one.crash()

        continued = await agent.stream(1)
        assert continued.request.last_event_id == "2"
        assert continued.request.turn_id == stream.request.turn_id
        continued.token(" you", event_id="3")
        continued.done()
        again = two.bench.connect(dialect=V2, resume=resume_of(socket))
        ended = await again.wait_for("turn_ended")

        assert ended["outcome"] == "completed"
        assert again.objects()[0]["resumed"] is True
        assert socket.text() + again.text() == "Hello you"
        got = seqs(socket, again)
        assert got == list(range(1, len(got) + 1))


async def test_a_relayed_socket_is_counted_once(redis_server: AnyRedis) -> None:
    """By the node that holds it, so that the nodes' figures can be added up; the turn, where it runs.

    The trace of its handshake goes with it.
    """
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        first = one.bench.connect(dialect=V2)
        await first.wait_for("welcome")
        relayed = two.bench.connect(dialect=V2, trace=CALLER)
        await relayed.wait_for("welcome")
        relayed.say(user_message("\u00e9", id="m"))
        stream = await agent.stream(0)
        assert stream.request.trace == CALLER
        stream.token("x")
        stream.done()
        await first.wait_for("turn_ended")
        await relayed.wait_for("turn_ended")
        owner, holder = one.bench.hub, two.bench.hub

        assert (owner.socket_count, holder.socket_count) == (1, 1)
        assert (owner.flow.frames_sent, holder.flow.frames_sent) == (len(first.frames), len(relayed.frames))
        assert (owner.flow.bytes_sent, holder.flow.bytes_sent) == (
            sum(map(len, first.frames)),
            sum(map(len, relayed.frames)),
        )
        assert (owner.flow.frames_received, holder.flow.frames_received) == (0, 1)
        said = len('{"type":"user_message","content":"\u00e9","id":"m"}'.encode())
        assert (owner.flow.bytes_received, holder.flow.bytes_received) == (0, said)
        assert (owner.flow.tokens, holder.flow.tokens) == (1, 0)
        relayed.drop()
        await trio.sleep(0.3)
        closed = ("gateway_sockets_closed_total", (("code", "1006"),))
        assert two.bench.telemetry.counts[closed] == 1
        assert closed not in one.bench.telemetry.counts


async def test_a_dead_nodes_turn_that_cannot_be_resumed_is_told(
    redis_server: AnyRedis,
) -> None:
    """``outcome_unknown``, and the runtime is not asked twice; a message that waited is carried out."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        socket.say(user_message("first", id="m1"))
        stream = await agent.stream(0)
        stream.token("x")
        await socket.wait_for("assistant_message")
        socket.say(user_message("second", id="m2"))
        await socket.wait_for("ack", 2)
        one.crash()

        second = await agent.stream(1)
        assert b"second" in second.request.message
        again = two.bench.connect(dialect=V2, resume=resume_of(socket))
        assert (await again.wait_for("turn_ended"))["outcome"] == "outcome_unknown"
        assert len(agent.streams) == 2


async def test_a_drained_node_hands_live_turns_over(redis_server: AnyRedis) -> None:
    """The other goes on, nothing is lost or repeated, and idle sessions move too."""
    agent = FakeAgent()
    agent.resumable = True
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        for session_id in ("s", "idle"):
            await claimed(one, session_id)
        socket, idle = one.bench.connect(dialect=V2), one.bench.connect("idle", dialect=V2)
        await idle.wait_for("welcome")
        socket.say(user_message(id="m"))
        stream = await agent.stream(0)
        stream.token("a", event_id="1")
        await socket.wait_for("assistant_message")
        await one.bench.hub.drain()

        assert socket.closed is not None
        assert socket.closed[0] == 1012
        assert "draining" in socket.types()
        again = two.bench.connect(dialect=V2, resume=resume_of(socket))
        continued = await agent.stream(1)
        assert continued.request.last_event_id == "1"
        continued.token("b", event_id="2")
        continued.done()
        assert (await again.wait_for("turn_ended"))["outcome"] == "completed"
        got = seqs(socket, again)
        assert got == list(range(1, len(got) + 1))
        assert await two.store.leases.acquire("idle") is None


async def test_a_draining_node_lets_a_turn_end_that_cannot_move(
    redis_server: AnyRedis,
) -> None:
    """No turn fails for a restart while there is time."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, _):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        socket.say(user_message(id="m"))
        stream = await agent.stream(0)
        stream.token("a")
        await socket.wait_for("assistant_message")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.bench.hub.drain)
            await trio.sleep(0.3)
            # Told to go, it would leave its answer.
            assert "draining" not in socket.types()
            assert socket.closed is None
            stream.token("b")
            stream.done()

        assert (await socket.wait_for("turn_ended"))["outcome"] == "completed"
        assert "draining" in socket.types()
        assert socket.closed is not None
        assert socket.closed[0] == 1012


async def test_a_turn_that_a_draining_node_ends_is_seen_through_another(redis_server: AnyRedis) -> None:
    """A multiplexed socket is let go at once; its session, which cannot move yet, is relayed from then on."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        shared = open_multiplexed(one.bench)
        shared.say({"type": "attach", "session_id": "s"})
        shared.say(user_message(session_id="s", id="m"))
        stream = await agent.stream(0)
        stream.token("a")
        await shared.wait_for("assistant_message")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.bench.hub.drain)
            while shared.closed is None:
                await shared.arrived.park()
            assert shared.closed[0] == 1012
            assert shared.types()[-1] == "draining"
            again = two.bench.connect(dialect=V2, resume=resume_of(shared))
            await again.wait_for("welcome")
            stream.token("b")
            await again.wait_for("assistant_message")
            stream.done()

        assert (await again.wait_for("turn_ended"))["outcome"] == "completed"
        assert shared.text() + again.text() == "ab"
        assert again.closed is not None
        assert again.closed[0] == 1012
        assert len(agent.streams) == 1


async def test_a_draining_node_sends_nothing_new_and_leaves_it_to_the_next(
    redis_server: AnyRedis,
) -> None:
    """A message that waited for the end of a turn, and one that was never sent, are the next node's work."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        socket.say(user_message("first", id="m1"))
        stream = await agent.stream(0)
        socket.say(user_message("second", id="m2"))
        await socket.wait_for("ack", 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.bench.hub.drain)
            await trio.sleep(0.3)
            stream.done()
        assert socket.closed is not None
        again = two.bench.connect(dialect=V2, resume=resume_of(socket))
        second = await agent.stream(1)
        assert b"second" in second.request.message
        second.token("x")
        second.done()

        assert (await again.wait_for("turn_ended"))["outcome"] == "completed"
        assert (socket.types() + again.types()).count("turn_started") == 2
        assert len(agent.streams) == 2
        got = seqs(socket, again)
        assert got == list(range(1, len(got) + 1))


async def test_a_node_that_lost_a_session_lets_its_sockets_go(
    redis_server: AnyRedis,
) -> None:
    """It was paused; another took over. Its sockets are closed with 1012 and nothing it has is stored."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        await socket.wait_for("welcome")
        redis_server.ask(f"ZREM gateway:nodes {one.store.leases.node}")
        assert await two.store.leases.acquire("s") is None
        socket.say(user_message(id="m"))
        while socket.closed is None:
            await socket.arrived.park()

        assert socket.closed[0] == 1012
        assert "ack" not in socket.types()
        assert agent.streams == []


async def test_a_node_that_woke_up_takes_no_client_for_one_of_a_store_that_lost_data(
    redis_server: AnyRedis,
) -> None:
    """Another one carried its session on. It tells of no new epoch, not even while it cannot ask Redis."""
    agent = FakeAgent()
    agent.resumable = True
    # To the other it is dead long before it says again that it lives, and hears what it lost.
    async with (
        nodes(redis_server, agent, "a", lease=60) as (hung,),
        nodes(redis_server, agent, "b") as (two,),
    ):
        await claimed(hung)
        socket = hung.bench.connect(dialect=V2)
        socket.say(user_message(id="m"))
        (await agent.stream(0)).token("a", event_id="1")
        await socket.wait_for("assistant_message")
        continued = await agent.stream(1)
        elsewhere = two.bench.connect(dialect=V2, resume=resume_of(socket))
        continued.token("b", event_id="2")
        await elsewhere.wait_for("assistant_message")
        elsewhere.drop()

        redis_server.signal(signal.SIGSTOP)
        try:
            early = hung.bench.connect(dialect=V2, resume=resume_of(elsewhere))
            while not early.frames and early.closed is None:
                await early.arrived.park()
        finally:
            redis_server.signal(signal.SIGCONT)
        assert early.types() == []
        assert early.closed is not None
        assert early.closed[0] == 1013

        while True:  # The other node finds its way back to Redis, too.
            again = hung.bench.connect(dialect=V2, resume=resume_of(elsewhere))
            while not again.frames and again.closed is None:
                await again.arrived.park()
            if again.frames:
                break
        continued.done()
        await again.wait_for("turn_ended")
        assert again.objects()[0]["resumed"] is True
        assert "snapshot" not in socket.types() + again.types()
        assert socket.closed == (1012, "session restarted")
        got = seqs(socket, elsewhere, again)
        assert got == list(range(1, len(got) + 1))


async def test_a_session_that_left_memory_is_free(redis_server: AnyRedis) -> None:
    """Another node gets it without waiting for anybody's end."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        await socket.wait_for("welcome")
        one.bench.hub.runners["s"].retire()
        await trio.sleep(0.3)

        assert await two.store.leases.acquire("s") is None


async def test_sockets_on_any_node_see_the_session_alike(redis_server: AnyRedis) -> None:
    """Three nodes: the same events with the same seqs; messages from each make one turn after the other."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b", "c") as every:
        await claimed(every[0])
        sockets = []
        for node in every:
            sockets.append(node.bench.connect(dialect=V2))
            await sockets[-1].wait_for("welcome")
        assert [len(node.bench.hub.runners) for node in every] == [1, 0, 0]
        for number, socket in enumerate(sockets):
            socket.say(user_message(f"from {number}", id=f"m{number}"))
            assert (await socket.wait_for("ack"))["status"] == "accepted"
            stream = await agent.stream(number)
            assert f"from {number}".encode() in stream.request.message
            for text in "abcdef":
                stream.token(f"{text}{number} ")
            stream.done()
            for each in sockets:
                await each.wait_for("turn_ended", number + 1)

        got = seqs(sockets[0])
        assert got == list(range(1, len(got) + 1))
        assert seqs(sockets[1]) == seqs(sockets[2]) == got
        assert sockets[1].text() == sockets[2].text() == sockets[0].text()
        assert [socket.types().count("ack") for socket in sockets] == [1, 1, 1]


async def test_a_remote_v2_client_resumes_acks_and_is_told_of_repeats(
    redis_server: AnyRedis,
) -> None:
    """Whatever a socket is owed on its session's own node, it gets through another one."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        remote.say(user_message(id="m"))
        await remote.wait_for("ack")
        stream = await agent.stream(0)
        stream.token("a")
        await remote.wait_for("assistant_message")
        remote.say({"type": "ack", "seq": 2})
        remote.drop()
        stream.token("b")
        stream.done()
        await local.wait_for("turn_ended")
        again = two.bench.connect(dialect=V2, resume=resume_of(remote))
        again.say(user_message(id="m"))

        assert (await again.wait_for("ack"))["status"] == "duplicate"
        assert again.objects()[0]["resumed"] is True
        assert seqs(remote, again) == seqs(local)
        assert len(agent.streams) == 1


async def test_a_remote_v1_client_that_comes_back_misses_and_repeats_nothing(
    redis_server: AnyRedis,
) -> None:
    """What its holder could not give to the kernel counts as not sent, exactly."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect()
        await trio.sleep(0.1)
        remote.say(user_message())
        stream = await agent.stream(0)
        for text in "abc":
            stream.token(text)
        await remote.wait_for("assistant_message", 3)
        remote.stalled = True
        for text in "def":
            stream.token(text)
        await local.wait_for("assistant_message", 6)
        await trio.sleep(0.1)
        remote.drop()
        await trio.sleep(0.1)
        again = two.bench.connect()
        for text in "ghi":
            stream.token(text)
        await again.wait_for("assistant_message", 6)

        assert remote.text() == "abc"
        assert again.text() == "defghi"


class LastOfItsNode(FakeConnection):
    """A socket whose node dies at the very moment when its client is given ``last``."""

    def __init__(self, node: Node, last: bytes) -> None:
        super().__init__()
        self._of_node = node
        self._last = last

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """As ever, and the node can tell nobody."""
        taken = super().send_nowait(payloads)
        if self._last in payloads[-1]:
            self._of_node.crash()
        return taken


async def test_what_a_dead_holder_may_have_given_to_a_v1_client_is_not_repeated(
    redis_server: AnyRedis,
) -> None:
    """Nobody knows whether it did, and a token must not come twice."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(connection=LastOfItsNode(two, b"bc"))
        await trio.sleep(0.1)
        local.say(user_message(id="m"))
        stream = await agent.stream(0)
        for number, text in enumerate(("a", "bc")):
            stream.token(text)
            await remote.wait_for("assistant_message", number + 1)
        await trio.sleep(2 * LEASE)
        again = one.bench.connect()
        stream.token("d")
        await again.wait_for("assistant_message")

        assert (remote.text(), again.text()) == ("abc", "d")


async def test_relayed_sockets_of_a_dead_node_are_let_go_and_served_again(
    redis_server: AnyRedis,
) -> None:
    """Its clients are told to come back with 1012, and their session runs where they come."""
    agent = FakeAgent()
    agent.resumable = True
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        remote.say(user_message(id="m"))
        stream = await agent.stream(0)
        stream.token("a", event_id="1")
        await remote.wait_for("assistant_message")
        one.crash()
        while remote.closed is None:
            await remote.arrived.park()
        assert remote.closed[0] == 1012
        again = two.bench.connect(dialect=V2, resume=resume_of(remote))
        continued = await agent.stream(1)
        continued.token("b", event_id="2")
        continued.done()
        await again.wait_for("turn_ended")

        got = seqs(remote, again)
        assert got == list(range(1, len(got) + 1))
        assert remote.text() + again.text() == "ab"


async def test_a_session_forgets_the_sockets_of_a_node_that_died(
    redis_server: AnyRedis,
) -> None:
    """They would hold it in memory for ever."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        await remote.wait_for("welcome")
        runner = one.bench.hub.runners["s"]
        assert len(runner.attachments) == 2
        two.crash()
        await trio.sleep(2 * LEASE)
        assert len(runner.attachments) == 1


async def test_letters_that_got_lost_end_the_relay(redis_server: AnyRedis) -> None:
    """A cut subscription: the client is closed with 1012 and resumes; it never waits for what cannot come."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        await remote.wait_for("welcome")
        local.say(user_message(id="m"))
        stream = await agent.stream(0)
        assert redis_server.ask("CLIENT KILL TYPE pubsub").startswith(":")
        stream.token("a")
        while remote.closed is None:
            await remote.arrived.park()
        assert remote.closed[0] == 1012
        await trio.sleep(0.3)
        again = two.bench.connect(dialect=V2, resume=resume_of(remote))
        stream.done()
        await again.wait_for("turn_ended")
        got = seqs(remote, again)
        assert got == list(range(1, len(got) + 1))


async def test_a_holder_that_drains_lets_its_relays_go(redis_server: AnyRedis) -> None:
    """The session stays where it runs; its clients are told when to come back."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        await remote.wait_for("welcome")
        await two.bench.hub.drain()

        assert remote.closed is not None
        assert remote.closed[0] == 1012
        assert "draining" in remote.types()
        assert local.closed is None
        assert one.bench.hub.session_count == 1


async def test_redis_away_leaves_every_node_responsive(redis_server: AnyRedis) -> None:
    """Relays end, nothing spins, and clients are served again when it is back."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        await remote.wait_for("welcome")
        redis_server.signal(signal.SIGSTOP)
        try:
            local.say(user_message(id="m"))
            remote.say(user_message(id="n"))
            # Each node has a letter for the other, which fails, and telling of that makes more letters.
            one.bench.hub.runners["s"].renew_epoch("for the test")
            assert (await local.wait_for("nack"))["code"] == "STORE_UNAVAILABLE"
            while remote.closed is None:
                await remote.arrived.park()
            assert remote.closed[0] == 1012
        finally:
            redis_server.signal(signal.SIGCONT)
        await agent.stream(0)


async def test_nothing_goes_before_the_welcome(redis_server: AnyRedis) -> None:
    """A holder that drains while the other node has not answered yet closes the socket without a word."""
    agent = FakeAgent()
    async with nodes(redis_server, agent, "a", "b") as (one, two):
        await claimed(one)
        local = one.bench.connect(dialect=V2)
        await local.wait_for("welcome")
        remote = two.bench.connect(dialect=V2)
        while not two.bench.hub.socket_count:
            await trio.lowlevel.checkpoint()
        assert remote.frames == []
        await two.bench.hub.drain()

        assert remote.closed is not None
        assert remote.closed[0] == 1012
        assert [kind for kind in remote.types() if kind == "draining"] == []
