"""Floods: what a socket sends too fast is refused, and a socket that goes on regardless is closed."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.core.errors import RateLimited
from gateway.core.identity import Identity
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.message_rate import REFUSALS_PER_MINUTE
from gateway.ports import Admission, UpgradeRequest
from tests.engine.fakes import Bench, FakeConnection, user_message

VALID: dict[str, object] = {"type": "cancel"}


async def settled() -> None:
    """Let everything happen that happens at this moment."""
    await trio.testing.wait_all_tasks_blocked()


async def test_messages_over_the_rate_are_refused_and_told_so(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """With the message's own id, and as retryable; after a pause there is room again."""
    bench = await Bench(nursery, messages_per_minute=2).start()
    socket = bench.connect()
    for number in range(3):
        socket.say(user_message(message_id=f"m{number}"))
    refusal = await socket.wait_for("error")
    assert (refusal["code"], refusal["message_id"], refusal["retryable"]) == ("RATE_LIMITED", "m2", True)
    await trio.sleep(30)
    socket.say(user_message(message_id="m3"))
    await settled()
    assert [item["message_id"] for item in socket.objects() if item["type"] == "ack"] == ["m0", "m1", "m3"]


@pytest.mark.parametrize("dialect", [Dialect.V1, Dialect.V2_JSON])
@pytest.mark.parametrize("invalid", ["{", '{"type":"no such"}', '{"type":"user_message"}'])
async def test_invalid_messages_count(
    dialect: Dialect, invalid: str, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Decoding them and answering them is the same work."""
    bench = await Bench(nursery, messages_per_minute=2).start()
    socket = bench.connect(dialect=dialect)
    for _ in range(3):
        socket.say(invalid)
    await settled()
    codes = [item["code"] for item in socket.objects() if item["type"] in ("error", "nack")]
    assert codes == ["INVALID_MESSAGE", "INVALID_MESSAGE", "RATE_LIMITED"]


async def test_acknowledgements_are_free(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A client over its rate must still be able to say what has arrived; what only looks like one counts."""
    bench = await Bench(nursery, messages_per_minute=1).start()
    socket = bench.connect(dialect=Dialect.V2_JSON)
    for _ in range(50):
        socket.say({"type": "ack", "seq": 0})
    socket.say({"type": "ack"})
    socket.say({"type": "ack"})
    await settled()
    assert [item["code"] for item in socket.objects() if item["type"] == "nack"] == [
        "INVALID_MESSAGE",
        "RATE_LIMITED",
    ]


async def test_a_subject_has_one_rate_for_all_its_sockets(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """From wherever; services with the internal key have none but their address's."""
    bench = await Bench(nursery, messages_per_minute=3).start()

    async def refused(identity: Identity, network: str) -> int:
        sockets = [FakeConnection() for _ in range(2)]
        for number, socket in enumerate(sockets):
            admission = Admission(
                f"s{network}{number}", identity, Dialect.V1, None, f"{network}.{number}", "r"
            )
            nursery.start_soon(bench.hub.serve, socket, admission)
            socket.say(VALID)
            socket.say(VALID)
        await settled()
        return sum(item.get("code") == "RATE_LIMITED" for socket in sockets for item in socket.objects())

    assert await refused(Identity("alice"), "203.0.113") == 1
    assert await refused(Identity("internal", sees_all=True), "198.51.100") == 0


@pytest.mark.parametrize("dialect", [Dialect.V1, Dialect.V2_JSON])
async def test_a_flood_costs_the_sender_its_socket(
    dialect: Dialect, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Closed with 4429 once it was told often enough; nobody else's socket is."""
    bench = await Bench(nursery, messages_per_minute=1).start()
    other = bench.connect("other", identity=Identity("bob"))
    socket = bench.connect(dialect=dialect, identity=Identity("alice"))
    for _ in range(REFUSALS_PER_MINUTE + 2):
        socket.say("{")
    await settled()
    assert socket.closed is not None
    assert socket.closed[0] == 4429
    assert other.closed is None


async def test_a_frame_of_many_messages_lets_others_have_their_turn(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Between two of its messages whatever else is ready runs."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=Dialect.V2_JSON)
    await settled()
    before = len(socket.objects())
    turns: list[int] = []

    async def look() -> None:
        while len(socket.objects()) < before + 100:
            turns.append(len(socket.objects()))
            await trio.lowlevel.checkpoint()

    socket.say("[" + ",".join('{"type":"no such","id":"x"}' for _ in range(100)) + "]")
    with trio.fail_after(1):
        await look()
    assert len(set(turns)) > 50


async def test_a_subject_holds_a_bounded_number_of_sockets(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """One more is refused at the upgrade with 429, and closed when it was admitted beside others."""
    bench = await Bench(nursery, limits=Limits(max_sockets_per_subject=2)).start()
    sockets = [bench.connect(f"s{number}", identity=Identity("alice")) for number in range(3)]
    await settled()
    closed = [socket.closed for socket in sockets if socket.closed is not None]
    assert [code for code, _ in closed] == [4429]
    headers = (("authorization", "Bearer alice"),)
    with pytest.raises(RateLimited) as caught:
        await bench.hub.admit(UpgradeRequest("/ws/s9", headers, "203.0.113.1"))
    assert caught.value.http_status == 429
    await bench.hub.admit(UpgradeRequest("/ws/s9", (("authorization", "Bearer bob"),), "203.0.113.1"))
    next(socket for socket in sockets if socket.closed is None).drop()
    await settled()
    await bench.hub.admit(UpgradeRequest("/ws/s10", headers, "203.0.113.1"))


async def test_all_sockets_together_are_bounded(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Also when many are admitted before the first of them is counted."""
    bench = await Bench(nursery, limits=Limits(max_sockets=2)).start()
    sockets: list[FakeConnection] = [bench.connect(f"s{number}") for number in range(3)]
    await settled()
    assert sorted(socket.closed[0] for socket in sockets if socket.closed is not None) == [1013]


def multiplexed(bench: Bench, identity: Identity) -> FakeConnection:
    """A socket for many sessions."""
    connection = FakeConnection()
    admission = Admission(None, identity, Dialect.V2_JSON, None, "203.0.113.1", "req")
    bench.nursery.start_soon(bench.hub.serve, connection, admission)
    return connection


@pytest.mark.parametrize("message", ['{"type":"attach","session_id":"s"}', "{", '{"type":"cancel"}'])
async def test_a_flood_on_a_multiplexed_socket_costs_the_sender_that_socket(
    message: str, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Attaching, which looks into the store, is no way around the rate."""
    bench = await Bench(nursery, messages_per_minute=1).start()
    socket = multiplexed(bench, Identity("alice"))
    for _ in range(REFUSALS_PER_MINUTE + 2):
        socket.say(message)
    await settled()
    assert socket.closed is not None
    assert socket.closed[0] == 4429


async def test_answers_that_nobody_reads_do_not_pile_up(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that asks again and again and takes nothing is closed long before its patience is up."""
    bench = await Bench(nursery).start()
    socket = multiplexed(bench, Identity("alice"))
    socket.stalled = True
    for _ in range(990):
        socket.say("[" + ",".join(['{"type":"attach","session_id":"s"}'] * 4) + "]")
    await trio.sleep(1)
    assert socket.closed is not None
    assert socket.closed[0] == 4413
