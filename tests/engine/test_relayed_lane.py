"""Sessions of other nodes on a multiplexed socket: two hubs on one real Redis."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import msgspec
import trio
import trio.testing

from gateway.core.flow import Flow
from gateway.core.identity import SCOPE_READ, Identity
from gateway.core.letters import Gone, Letter
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.relayed_lane import RelayedLane
from gateway.engine.shared_socket import SharedSocket
from gateway.ports import Admission, ConnectionClosed
from tests.engine.fakes import FakeAgent, FakeConnection, FakeStream, user_message
from tests.engine.test_multiplexed import of, open_multiplexed
from tests.engine.test_several_nodes import LEASE, Node, claimed, nodes
from tests.redis_server import RedisServer

AWAY, HERE = "away", "here"
"""The session that the other node runs, and one of the node that holds the socket."""


@asynccontextmanager
async def two_nodes(
    redis: RedisServer, *, dialect: Dialect = Dialect.V2_JSON
) -> AsyncIterator[tuple[FakeAgent, Node, Node, FakeConnection, FakeConnection]]:
    """The node that runs ``away``, with a socket of its own for it, and one with a multiplexed socket."""
    agent = FakeAgent()
    agent.resumable = True
    async with nodes(redis, agent, "a", "b") as (one, two):
        for name in (AWAY, HERE):
            await claimed(one, name)
        local = one.bench.connect(AWAY, dialect=Dialect.V2_JSON)
        await local.wait_for("welcome")
        yield agent, one, two, local, open_multiplexed(two.bench, dialect)


def attach(socket: FakeConnection, *names: str) -> None:
    """Have the client attach sessions."""
    for name in names:
        socket.say({"type": "attach", "session_id": name})


def seqs(socket: FakeConnection, session_id: str) -> list[int]:
    """Those that have come for a session; merged ones count as what they stand for."""
    found: list[int] = []
    for item in of(socket, session_id):
        if "seq" in item and item["type"] != "snapshot":
            last = item["seq"]
            assert isinstance(last, int)
            first = item.get("first_seq", last)
            assert isinstance(first, int)
            found += range(first, last + 1)
    return found


def text(socket: FakeConnection, session_id: str) -> str:
    """All tokens of a session."""
    return "".join(str(item.get("token", "")) for item in of(socket, session_id))


async def until_counted(agent: FakeAgent, number: int) -> FakeStream:
    """A turn's stream, with three tokens in it."""
    stream = await agent.stream(number)
    for index, token in enumerate("abc"):
        stream.token(token, event_id=str(index))
    return stream


async def test_a_session_of_another_node_is_like_any_other(redis_server: RedisServer) -> None:
    """Welcome, messages, events and answers, beside a session of this node, each under its own id."""
    async with two_nodes(redis_server) as (agent, one, two, local, socket):
        attach(socket, AWAY, HERE)
        for number, name in enumerate((AWAY, HERE)):
            socket.say(user_message(f"to {name}", id="m", session_id=name))
            stream = await until_counted(agent, number)
            assert stream.request.session_id == name
            stream.done()
            await socket.wait_for("turn_ended", number + 1)
        socket.say({"type": "ack", "session_id": AWAY, "seq": 3})
        socket.say(user_message("again", id="m", session_id=AWAY))
        assert (await socket.wait_for("ack", 3))["status"] == "duplicate"

        assert set(one.bench.hub.runners) == {AWAY}
        assert set(two.bench.hub.runners) == {HERE}
        kinds = [item["type"] for item in of(socket, AWAY)]
        assert kinds[0] == "welcome"
        assert kinds == [item["type"] for item in of(socket, HERE)] + ["ack"]
        assert seqs(socket, AWAY) == [int(item["seq"]) for item in local.objects() if "seq" in item]
        assert text(socket, AWAY) == text(socket, HERE) == "abc"
        assert all("session_id" in item for item in socket.objects())


async def test_it_is_resumed_by_attach(redis_server: RedisServer) -> None:
    """With epoch and last_seq, exactly what is missing comes, through the other node as well."""
    async with two_nodes(redis_server) as (agent, _, _, local, socket):
        local.say(user_message(id="m"))
        stream = await until_counted(agent, 0)
        await local.wait_for("assistant_message", 3)
        epoch = local.objects()[0]["epoch"]
        socket.say({"type": "attach", "session_id": AWAY, "epoch": epoch, "last_seq": 3})
        assert (await socket.wait_for("welcome"))["resumed"] is True
        stream.done()
        await socket.wait_for("turn_ended")

        assert seqs(socket, AWAY) == [4, 5]
        assert text(socket, AWAY) == "c"


async def test_messagepack_clients_have_it_too(redis_server: RedisServer) -> None:
    """Between the nodes it is JSON all the same."""
    async with two_nodes(redis_server, dialect=Dialect.V2_MSGPACK) as (agent, _, _, _, socket):
        messages = [{"type": "attach", "session_id": AWAY}, user_message(id="m", session_id=AWAY)]
        socket.say(msgspec.msgpack.encode(messages))
        (await until_counted(agent, 0)).done()
        found: list[dict[str, object]] = []
        while "turn_ended" not in [item["type"] for item in found]:
            await socket.arrived.park()
            decoded = [msgspec.msgpack.decode(frame) for frame in socket.frames]
            found = [item for frame in decoded for item in (frame if isinstance(frame, list) else [frame])]

        assert "".join(str(item.get("token", "")) for item in found) == "abc"
        assert {item["session_id"] for item in found} == {AWAY}


async def test_a_node_that_dies_costs_an_attach(redis_server: RedisServer) -> None:
    """``detached`` with 1012, for that session alone; attached again it goes on, nothing missing or twice."""
    async with two_nodes(redis_server) as (agent, one, _, _, socket):
        attach(socket, AWAY, HERE)
        socket.say(user_message(id="m", session_id=AWAY))
        await until_counted(agent, 0)
        while text(socket, AWAY) != "abc":
            await socket.arrived.park()
        one.crash()
        told = await socket.wait_for("detached")
        assert (told["session_id"], told["code"]) == (AWAY, 1012)

        welcome = next(item for item in of(socket, AWAY) if item["type"] == "welcome")
        last = seqs(socket, AWAY)[-1]
        await trio.sleep(LEASE)
        socket.say({"type": "attach", "session_id": AWAY, "epoch": welcome["epoch"], "last_seq": last})
        again = await agent.stream(1)
        again.token("d", event_id="3")
        again.done()
        await socket.wait_for("turn_ended")

        assert text(socket, AWAY) == "abcd"
        got = seqs(socket, AWAY)
        assert got == list(range(1, len(got) + 1))
        assert socket.closed is None
        socket.say(user_message(id="m", session_id=HERE))
        assert (await agent.stream(2)).request.session_id == HERE


async def test_a_node_that_drains_is_not_this_socket_draining(redis_server: RedisServer) -> None:
    """No ``draining``, which is about a whole socket: the session is detached, and attached again is here."""
    async with two_nodes(redis_server) as (_, one, two, _, socket):
        attach(socket, AWAY)
        await socket.wait_for("welcome")
        await one.bench.hub.drain()
        assert (await socket.wait_for("detached"))["code"] == 1012
        attach(socket, AWAY)
        await socket.wait_for("welcome", 2)

        assert "draining" not in socket.types()
        assert socket.closed is None
        assert AWAY in two.bench.hub.runners


async def test_both_nodes_forget_a_session_that_is_left(redis_server: RedisServer) -> None:
    """By detach, by attaching it anew, and by the end of the socket."""
    async with two_nodes(redis_server) as (_, one, two, local, socket):
        runner = one.bench.hub.runners[AWAY]
        relays = two.bench.hub._relays
        assert relays is not None

        async def attachments(number: int) -> None:
            for _ in range(500):
                if len(list(runner.attachments)) == number:
                    return
                await trio.sleep(0.01)
            raise AssertionError(f"it has {len(list(runner.attachments))} sockets")

        attach(socket, AWAY)
        await socket.wait_for("welcome")
        attach(socket, AWAY)
        await socket.wait_for("welcome", 2)
        await attachments(2)
        assert len(relays._held) == 1
        socket.say({"type": "detach", "session_id": AWAY})
        assert (await socket.wait_for("detached"))["code"] == 1000
        await attachments(1)
        assert not relays._held
        attach(socket, AWAY)
        await attachments(2)
        socket.drop()
        await attachments(1)

        assert not relays._held
        assert local.closed is None


async def test_a_burst_waits_for_a_slow_socket(redis_server: RedisServer) -> None:
    """Nothing is lost or repeated, and the session here has its turns in between."""
    async with two_nodes(redis_server) as (agent, _, _, _, socket):
        attach(socket, AWAY)
        socket.say(user_message(id="m", session_id=AWAY))
        stream = await agent.stream(0)
        await socket.wait_for("turn_started")
        socket.stalled = True
        expected = ""
        for number in range(2000):
            expected += (token := f"{number} " + "x" * 500)
            stream.token(token)
        stream.done()
        await trio.sleep(0.3)
        attach(socket, HERE)
        await trio.sleep(0.1)
        socket.unstall()
        read, new = 0, b""
        while b'"turn_ended"' not in new:
            new, read = b"".join(socket.frames[read:]), len(socket.frames)
            if last := re.findall(rb'"seq":(\d+)', new):
                socket.say({"type": "ack", "session_id": AWAY, "seq": int(last[-1])})
            if b'"turn_ended"' not in new:
                await socket.arrived.park()

        assert text(socket, AWAY) == expected
        got = seqs(socket, AWAY)
        assert got == list(range(1, len(got) + 1))
        assert of(socket, HERE)[0]["type"] == "welcome"


async def test_who_may_write_is_decided_here(redis_server: RedisServer) -> None:
    """A token that may only read gets the same answer as for a session of this node; acks are free."""
    async with two_nodes(redis_server) as (agent, _, two, _, _):
        socket = FakeConnection()
        reader = Identity("anonymous", scopes=frozenset({SCOPE_READ}))
        admission = Admission(None, reader, Dialect.V2_JSON, None, "203.0.113.1", "req")
        two.bench.nursery.start_soon(two.bench.hub.serve, socket, admission)
        attach(socket, AWAY, HERE)
        await socket.wait_for("welcome", 2)
        for name in (AWAY, HERE):
            socket.say(user_message(id="m", session_id=name))
            socket.say({"type": "ack", "session_id": name, "seq": 0})
        await socket.wait_for("nack", 2)
        away, here = ([item for item in of(socket, name) if item["type"] == "nack"] for name in (AWAY, HERE))

        assert [item["code"] for item in away] == [item["code"] for item in here] == ["INSUFFICIENT_SCOPE"]
        assert not agent.streams


async def test_a_renewed_token_is_for_all_sessions(redis_server: RedisServer) -> None:
    """Warned and answered once, by this node; the old expiry ends neither socket nor session."""
    async with two_nodes(redis_server) as (agent, _, two, _, _):
        socket = FakeConnection()
        now = two.bench.clock.now()
        identity = Identity("anonymous", expires_at=now + 0.4)
        admission = Admission(None, identity, Dialect.V2_JSON, None, "203.0.113.1", "req")
        two.bench.nursery.start_soon(two.bench.hub.serve, socket, admission)
        attach(socket, AWAY)
        await socket.wait_for("welcome")
        socket.say({"type": "authenticate", "token": f"anonymous@{now + 1000}"})
        await socket.wait_for("authenticated")
        await trio.sleep(0.6)
        socket.say(user_message(id="m", session_id=AWAY))
        (await until_counted(agent, 0)).done()
        await socket.wait_for("turn_ended")

        assert socket.types().count("token_expiring") == 1
        assert socket.types().count("authenticated") == 1
        assert "detached" not in socket.types()


async def test_a_lost_socket_is_one_sockets_business(redis_server: RedisServer) -> None:
    """What still comes for it ends nothing: the node goes on relaying others."""
    async with two_nodes(redis_server) as (agent, _, two, local, socket):
        attach(socket, AWAY)
        await socket.wait_for("welcome")
        local.say(user_message(id="m"))
        stream = await agent.stream(0)
        socket.lost = ConnectionClosed(1006)
        stream.token("a")
        await local.wait_for("assistant_message")
        await trio.sleep(0.1)
        another = open_multiplexed(two.bench)
        attach(another, AWAY)
        await another.wait_for("welcome")
        stream.token("b")
        stream.done()
        await another.wait_for("turn_ended")


async def test_sessions_on_one_socket_are_one_socket(redis_server: RedisServer) -> None:
    """However many are attached, they count as one, at the node that holds it, and not where they run."""
    async with two_nodes(redis_server) as (_, one, two, _, _):
        alice = Identity("alice")
        most = one.bench.limits.max_sockets_per_subject
        names = [f"{AWAY}-{number}" for number in range(most)]
        for name in names:
            await one.store.claim(name, "alice", 1.0)
            await one.bench.connect(name, dialect=Dialect.V2_JSON, identity=alice).wait_for("welcome")
        shared = FakeConnection()
        admission = Admission(None, alice, Dialect.V2_JSON, None, "203.0.113.1", "req")
        two.bench.nursery.start_soon(two.bench.hub.serve, shared, admission)
        attach(shared, *names)
        await shared.wait_for("welcome", most)

        assert one.bench.hub.sockets.held_by("alice") == most
        assert two.bench.hub.sockets.held_by("alice") == 1


async def test_who_leaves_does_not_wait_any_more(autojump_clock: trio.testing.MockClock) -> None:
    """What a slow socket did not take goes with the session: no task stays to wait for its turn."""
    connection = FakeConnection()
    connection.stalled = True
    shared = SharedSocket(connection, Dialect.V2_JSON, Limits(), Flow())
    letters: list[Letter] = []
    lane = shared.open_lane(AWAY)
    relayed = RelayedLane(1, lane, cast("IdentityWatch", None), letters.append, lambda: None)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            relayed.begin(lambda: nursery.start_soon(relayed.flush))
            relayed.sent([b'{"seq":1,"type":"a"}'])
            relayed.sent([b'{"seq":2,"type":"a"}'])
            await trio.testing.wait_all_tasks_blocked()
            assert lane.unsent
            relayed.finish()
            relayed.leave()
            shared.close_lane(lane)

    assert letters[-1] == Gone(1, 1000, "detached")
