"""A hub on a Redis whose master fails over, as its clients see it. Real sentinels, real time."""

from __future__ import annotations

import trio

from tests.engine.fakes import FakeAgent, user_message
from tests.engine.test_several_nodes import V2, claimed, nodes, resume_of, seqs
from tests.redis_groups import SentinelGroup, wait_until


async def test_a_turn_streams_on_when_the_replica_has_everything(sentinels: SentinelGroup) -> None:
    """On the same socket, after a pause; nothing is missing and nothing comes twice."""
    agent = FakeAgent()
    async with nodes(sentinels, agent, "a") as (one,):
        await claimed(one)
        socket = one.bench.connect(dialect=V2)
        socket.say(user_message(id="m"))
        stream = await agent.stream(0)
        stream.token("Hel")
        await socket.wait_for("assistant_message")
        former = sentinels.master
        await trio.to_thread.run_sync(wait_until, lambda: sentinels.is_replicated)
        former.kill()
        stream.token("lo")
        await trio.to_thread.run_sync(wait_until, lambda: sentinels.master is not former)
        stream.token(" you")
        stream.done()

        assert (await socket.wait_for("turn_ended"))["outcome"] == "completed"
        assert socket.text() == "Hello you"
        got = seqs(socket)
        assert got == list(range(1, len(got) + 1))


async def test_a_client_is_told_that_what_it_saw_was_lost(sentinels: SentinelGroup) -> None:
    """1012, then a new epoch with a snapshot; a session that lost nothing goes on as if nothing were."""
    agent = FakeAgent()
    async with nodes(sentinels, agent, "a") as (one,):
        sockets = {}
        for number, session_id in enumerate(("lost", "kept")):
            await claimed(one, session_id)
            sockets[session_id] = one.bench.connect(session_id, dialect=V2)
            sockets[session_id].say(user_message(id="m"))
            (await agent.stream(number)).token("seen")
            await sockets[session_id].wait_for("assistant_message")
        former = sentinels.master
        await trio.to_thread.run_sync(wait_until, lambda: sentinels.is_settled)
        former.isolate()
        (await agent.stream(0)).token(" and lost")
        await sockets["lost"].wait_for("assistant_message", 2)
        former.kill()
        await trio.to_thread.run_sync(wait_until, lambda: sentinels.master is not former)
        for number in range(2):
            (await agent.stream(number)).token(" later")
        await sockets["kept"].wait_for("assistant_message", 2)
        await trio.to_thread.run_sync(wait_until, lambda: sockets["lost"].closed is not None)

        assert sockets["lost"].closed is not None
        assert sockets["lost"].closed[0] == 1012
        again = one.bench.connect("lost", dialect=V2, resume=resume_of(sockets["lost"]))
        assert (await again.wait_for("snapshot"))["reason"] == "epoch_changed"
        assert "snapshot" not in sockets["kept"].types()
        assert sockets["kept"].closed is None
        assert sockets["kept"].text() == "seen later"
