"""The Trio shell against a scripted gateway on loopback, on virtual time."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from gateway.client import (
    ConnectionState,
    MessageRefused,
    MessageTooLarge,
    OutcomeUnknown,
    Reconnecting,
    ResumePoint,
    Session,
    SessionEnded,
    SessionEvent,
    open_session,
)
from gateway.client.transport import TransportSettings
from tests.client.fake_gateway import Peer, fake_gateway
from tests.client.test_session_state import ack, nack, snapshot, token


async def take(session: Session, count: int) -> list[SessionEvent]:
    """The next events."""
    events = []
    async for event in session.events():
        events.append(event)
        if len(events) == count:
            break
    return events


def seqs(events: list[SessionEvent]) -> list[int]:
    """Their numbers."""
    return [event.seq for event in events]


async def stay(peer: Peer) -> None:
    """Say welcome and nothing else."""
    await peer.welcome()
    await peer.closed_with()


async def resume_with_two(peer: Peer) -> None:
    """Resume behind event 1 and stay."""
    await peer.welcome(resumed=True)
    await peer.send(token(2))
    await peer.closed_with()


def then_close(code: int) -> Callable[[Peer], Awaitable[None]]:
    """One event, then a close."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1))
        await peer.close(code)

    return script


async def then_reset(peer: Peer) -> None:
    """One event, then no connection."""
    await peer.welcome()
    await peer.send(token(1))
    await trio.sleep(0.01)
    await peer.reset()


# ---------------------------------------------------------------------- coming back


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 4408, 4413, 4429])
async def test_comes_back_after(code: int, autojump_clock: MockClock) -> None:
    """These codes are followed by another socket that resumes."""
    async with (
        fake_gateway(then_close(code), resume_with_two) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        assert seqs(await take(session, 2)) == [1, 2]
    assert [request["path"] for request in gateway.requests] == [
        "/api/v1/ws/s1",
        "/api/v1/ws/s1?epoch=E1&last_seq=1",
    ]


async def test_comes_back_after_a_reset(autojump_clock: MockClock) -> None:
    """So it is with a connection that just ends."""
    async with (
        fake_gateway(then_reset, resume_with_two) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        assert seqs(await take(session, 2)) == [1, 2]


@pytest.mark.parametrize("code", [1009, 4400, 4403])
async def test_ends_after(code: int, autojump_clock: MockClock) -> None:
    """These codes end it, for readers and senders, with the events before them still given."""
    async with (
        fake_gateway(then_close(code)) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        with pytest.raises(SessionEnded) as sending:
            await session.send_user_message("x")
        assert seqs(await take(session, 1)) == [1]
        with pytest.raises(SessionEnded) as reading:
            await take(session, 1)
        assert (sending.value.code, reading.value.code) == (code, code)
        with pytest.raises(SessionEnded):
            await session.send_user_message("x")
    assert len(gateway.requests) == 1


async def test_iteration_ends_after_a_normal_close(autojump_clock: MockClock) -> None:
    """1000 is no failure for a reader."""
    async with (
        fake_gateway(then_close(1000)) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        assert seqs(await take(session, 5)) == [1]


async def test_backs_off_with_full_jitter(autojump_clock: MockClock) -> None:
    """The bound doubles from 0.5 s to 30 s; it begins anew once a socket brought something."""

    async def reset(peer: Peer) -> None:
        await peer.reset()

    states: list[ConnectionState] = []
    async with (
        fake_gateway(then_reset, *[reset] * 7, then_reset_resumed, stay) as gateway,
        open_session(gateway.url, session_id="s1", randomness=lambda: 1.0, on_state=states.append) as session,
    ):
        await take(session, 2)
        with trio.move_on_after(1):
            await take(session, 1)
    delays = [state.delay for state in states if isinstance(state, Reconnecting)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 0.5]


async def then_reset_resumed(peer: Peer) -> None:
    """One event behind event 1, then no connection."""
    await peer.welcome(resumed=True)
    await peer.send(token(2))
    await trio.sleep(0.01)
    await peer.reset()


async def test_waits_as_long_as_a_refused_upgrade_asks_for(autojump_clock: MockClock) -> None:
    """503 with Retry-After is followed by that pause."""
    async with fake_gateway(503, stay) as gateway:
        gateway.refusal_headers.append((b"Retry-After", b"7"))
        async with open_session(gateway.url, session_id="s1"):
            pass
    assert 7.0 <= gateway.times[1] - gateway.times[0] < 7.1


@pytest.mark.parametrize(("status", "code"), [(400, 4400), (401, 4401), (403, 4403), (404, 4400)])
async def test_refused_upgrade_ends_it(status: int, code: int, autojump_clock: MockClock) -> None:
    """What cannot succeed is not tried again, and the gateway's own words are passed on."""
    async with fake_gateway(status) as gateway:
        with pytest.raises(SessionEnded, match="go away") as ended:
            async with open_session(gateway.url, session_id="s1", token="abc"):
                pass
    assert ended.value.code == code
    assert len(gateway.requests) == 1


async def test_gives_up_the_first_connection_in_time(autojump_clock: MockClock) -> None:
    """Without a gateway, opening fails after ``connect_timeout`` and says why."""
    with pytest.raises(SessionEnded, match="cannot connect") as ended:
        async with open_session("http://127.0.0.1:1", session_id="s1", connect_timeout=5):
            pass
    assert ended.value.code == 1006
    assert trio.current_time() == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 101 X\r\nX-\xff: y\r\n\r\n", b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
)
async def test_broken_handshake_is_an_accident(answer: bytes, autojump_clock: MockClock) -> None:
    """Whatever answers there instead of the gateway, the application only sees that it is not connected."""

    async def answer_and_leave(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer or b" ")
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer_and_leave, [listener])
        with pytest.raises(SessionEnded):
            async with open_session(
                f"http://127.0.0.1:{listener.socket.getsockname()[1]}", session_id="s1", connect_timeout=60
            ):
                pass
        nursery.cancel_scope.cancel()


async def test_connection_lost_during_the_handshake_is_noticed_at_once(autojump_clock: MockClock) -> None:
    """trio-websocket itself would wait for ever."""
    states: list[ConnectionState] = []

    async def leave(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, leave, [listener])
        with pytest.raises(SessionEnded):
            async with open_session(
                f"http://127.0.0.1:{listener.socket.getsockname()[1]}",
                session_id="s1",
                connect_timeout=1,
                randomness=lambda: 1.0,
                on_state=states.append,
            ):
                pass
        nursery.cancel_scope.cancel()
    assert [state.delay for state in states if isinstance(state, Reconnecting)] == [0.5, 1.0]


async def test_breaks_off_at_a_gap_and_resumes(autojump_clock: MockClock) -> None:
    """A missing event closes the socket with 1002; the next one brings it."""
    codes = []

    async def skip(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1), token(3))
        codes.append(await peer.closed_with())

    async with (
        fake_gateway(skip, resume_with_two) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        assert seqs(await take(session, 2)) == [1, 2]
    assert codes == [1002]


@pytest.mark.parametrize("frame", ["{", "[]", "1", '["x"]', b"\xc1", "[" * 5000])
async def test_undecodable_frame_breaks_off(frame: str | bytes, autojump_clock: MockClock) -> None:
    """A frame that is no object and no array of them is a broken protocol, not a crash."""

    async def send_it(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1))
        await peer.send_raw(frame)
        await peer.closed_with()

    async with (
        fake_gateway(send_it, resume_with_two) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        assert seqs(await take(session, 2)) == [1, 2]


async def test_events_of_the_agent_may_nest_deeper_than_messages_and_repeat_keys(
    autojump_clock: MockClock,
) -> None:
    """The gateway passes on what agents send; a strict client would reconnect over it for ever."""

    async def send_deep(peer: Peer) -> None:
        await peer.welcome()
        await peer.send_raw('{"seq":1,"type":"plan","a":1,"a":2,"deep":' + "[" * 120 + "]" * 120 + "}")
        await peer.closed_with()

    async with fake_gateway(send_deep) as gateway, open_session(gateway.url, session_id="s1") as session:
        assert (await take(session, 1))[0].fields["a"] == 2


async def test_snapshot_comes_as_an_event(autojump_clock: MockClock) -> None:
    """What cannot be replayed is said, not skipped."""

    async def forget(peer: Peer) -> None:
        await peer.welcome(epoch="E2", last_seq=9)
        await peer.send(snapshot(9, "E2", "epoch_changed"), token(10))
        await peer.closed_with()

    async with (
        fake_gateway(then_reset, forget) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        events = await take(session, 3)
        assert [(event.type, event.seq) for event in events[1:]] == [
            ("snapshot", 9),
            ("assistant_message", 10),
        ]
        assert session.position == ResumePoint("E2", 10)


async def test_draining_gateway_is_left_and_met_again_when_it_says(autojump_clock: MockClock) -> None:
    """With or without a close of its own, the next socket comes after ``reconnect_after_ms``."""

    async def drain(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1), {"type": "draining", "reconnect_after_ms": 1500})
        await peer.close(1012)

    async def drain_and_stay(peer: Peer) -> None:
        await peer.welcome(resumed=True)
        await peer.send(token(2), {"type": "draining", "reconnect_after_ms": 2500})
        await peer.closed_with()

    async def end(peer: Peer) -> None:
        await peer.welcome(resumed=True)
        await peer.send(token(3))
        await peer.closed_with()

    async with (
        fake_gateway(drain, drain_and_stay, end) as gateway,
        open_session(gateway.url, session_id="s1") as session,
    ):
        await take(session, 3)
    assert gateway.times[1] - gateway.times[0] == pytest.approx(1.5, abs=0.05)
    assert gateway.times[2] - gateway.times[1] == pytest.approx(2.5, abs=0.05)


async def test_socket_without_a_welcome_is_left(autojump_clock: MockClock) -> None:
    """What accepts the upgrade and says nothing is no gateway."""

    async def say_nothing(peer: Peer) -> None:
        await peer.closed_with()

    async with fake_gateway(say_nothing, stay) as gateway, open_session(gateway.url, session_id="s1"):
        pass
    assert gateway.times[1] - gateway.times[0] == pytest.approx(10, abs=0.6)


async def test_gateway_that_has_gone_silent_is_left(autojump_clock: MockClock) -> None:
    """A ping without a pong in time ends the socket: an idle dead connection shows nothing else."""
    stuck = trio.Event()

    async def freeze(stream: trio.SocketStream) -> None:
        # A gateway up to the welcome, then a black hole.
        async with stream:
            client = await trio.open_tcp_stream("127.0.0.1", port)
            async with client, trio.open_nursery() as nursery:

                async def pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
                    while data := await source.receive_some():
                        if stuck.is_set():
                            await trio.sleep_forever()
                        await target.send_all(data)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, stream, client)
                nursery.start_soon(pump, client, stream)

    async with fake_gateway(stay, resume_with_two) as gateway, trio.open_nursery() as nursery:
        port = int(gateway.url.rpartition(":")[2])
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, freeze, [listener])
        states: list[ConnectionState] = []
        async with open_session(
            f"http://127.0.0.1:{listener.socket.getsockname()[1]}", session_id="s1", on_state=states.append
        ):
            stuck.set()
            with trio.move_on_after(29.9):
                await trio.sleep_forever()
            assert not any(isinstance(state, Reconnecting) for state in states)
            await trio.sleep(0.2)
            assert any(isinstance(state, Reconnecting) for state in states)
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------------- messages


async def test_unanswered_message_is_sent_again_under_its_id(autojump_clock: MockClock) -> None:
    """The application notices nothing of the socket that was lost."""
    ids = []

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        ids.append((await peer.receive())["id"])
        await peer.reset()

    async def answer(peer: Peer) -> None:
        await peer.welcome(resumed=True)
        message = await peer.receive()
        ids.append(message["id"])
        await peer.send(ack(message["id"], "t7", "duplicate"))
        await peer.closed_with()

    async with fake_gateway(lose, answer) as gateway, open_session(gateway.url, session_id="s1") as session:
        accepted = await session.send_user_message("x")
    assert (accepted.turn_id, accepted.duplicate) == ("t7", True)
    assert ids[0] == ids[1] == accepted.message_id


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_messages_have_the_fields_of_the_protocol(encoding: str, autojump_clock: MockClock) -> None:
    """Each method sends its message, without fields that were not given."""
    seen = []

    async def answer(peer: Peer) -> None:
        await peer.welcome()
        while True:
            message = await peer.receive()
            seen.append({name: value for name, value in message.items() if name != "id"})
            await peer.send(ack(message["id"]))

    async with (
        fake_gateway(answer) as gateway,
        open_session(gateway.url, session_id="s1", encoding=encoding) as session,  # type: ignore[arg-type]
    ):
        await session.send_user_message("x", agent_type="coder")
        await session.switch_agent("ask", reason="why")
        await session.tool_result("c1", result=None, tool_name="read_file")
        await session.tool_result("c2", error="no")
        await session.decide("c3", "edit", modified_arguments={"a": None})
        assert await session.cancel()
    assert seen == [
        {"type": "user_message", "content": "x", "agent_type": "coder"},
        {"type": "switch_agent", "agent_type": "ask", "reason": "why"},
        {"type": "tool_result", "call_id": "c1", "tool_name": "read_file", "result": None},
        {"type": "tool_result", "call_id": "c2", "error": "no"},
        {"type": "hitl_decision", "call_id": "c3", "decision": "edit", "modified_arguments": {"a": None}},
        {"type": "cancel"},
    ]


async def test_refusals_are_raised(autojump_clock: MockClock) -> None:
    """A refusal names its code; that there is nothing to cancel is none."""

    async def refuse(peer: Peer) -> None:
        await peer.welcome()
        while True:
            message = await peer.receive()
            code = "NO_SUCH_TURN" if message["type"] == "cancel" else "ALREADY_DECIDED"
            await peer.send(nack(message["id"], code))

    async with fake_gateway(refuse) as gateway, open_session(gateway.url, session_id="s1") as session:
        assert not await session.cancel()
        with pytest.raises(MessageRefused) as refused:
            await session.decide("c1", "approve")
        assert refused.value.code == "ALREADY_DECIDED"
        with pytest.raises(MessageTooLarge):
            await session.send_user_message("x" * 1000)


async def test_what_may_have_been_done_is_not_sent_into_another_epoch(autojump_clock: MockClock) -> None:
    """The sender learns that the outcome is unknown."""

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        await peer.receive()
        await peer.reset()

    async def forget(peer: Peer) -> None:
        await peer.welcome(epoch="E2")
        await peer.send(snapshot(0, "E2", "no_such_session"))
        await peer.closed_with()

    async with fake_gateway(lose, forget) as gateway, open_session(gateway.url, session_id="s1") as session:
        with pytest.raises(OutcomeUnknown):
            await session.send_user_message("x")


async def test_cancelled_send_is_not_sent_again(autojump_clock: MockClock) -> None:
    """Who gives up on a message does not find it done later by this library."""
    later = []

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        await peer.receive()
        await trio.sleep(2)
        await peer.reset()

    async def watch(peer: Peer) -> None:
        await peer.welcome(resumed=True)
        later.append(await peer.receive())

    async with fake_gateway(lose, watch) as gateway, open_session(gateway.url, session_id="s1") as session:
        with trio.move_on_after(1) as waiting:
            await session.send_user_message("x")
        assert waiting.cancelled_caught
        await trio.sleep(5)
    assert len(gateway.requests) == 2
    assert later == []


async def test_acknowledges_a_second_after_an_event_was_taken(autojump_clock: MockClock) -> None:
    """At the latest; and at once for the hundredth."""
    acks = []

    async def collect(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1))
        acks.append(((await peer.receive())["seq"], trio.current_time()))
        await peer.send(token(101, first_seq=2))
        acks.append(((await peer.receive())["seq"], trio.current_time()))
        await peer.closed_with()

    async with fake_gateway(collect) as gateway, open_session(gateway.url, session_id="s1") as session:
        began = trio.current_time()
        await take(session, 2)
        await trio.sleep(0.5)
    assert [seq for seq, _ in acks] == [1, 101]
    assert [time - began for _, time in acks] == pytest.approx([1.0, 1.0], abs=0.05)


# ---------------------------------------------------------------------- tokens


async def test_new_token_after_4401_and_before_expiry(autojump_clock: MockClock) -> None:
    """The provider is asked at first, after 4401, and when a token is about to expire."""
    tokens = iter(["one", "two", "three"])
    renewals = []

    async def expire(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1))
        await peer.close(4401)

    async def warn(peer: Peer) -> None:
        await peer.welcome(resumed=True)
        await peer.send({"type": "token_expiring", "in_s": 60})
        renewals.append((await peer.receive())["token"])
        await peer.reset()

    async def provide() -> str:
        return next(tokens)

    async with (
        fake_gateway(expire, warn, resume_with_two) as gateway,
        open_session(gateway.url, session_id="s1", token_provider=provide) as session,
    ):
        await take(session, 2)
    assert [request["headers"]["authorization"] for request in gateway.requests] == [
        "Bearer one",
        "Bearer two",
        "Bearer three",
    ]
    assert renewals == ["three"]


async def test_ends_after_4401_without_a_provider(autojump_clock: MockClock) -> None:
    """There is no way to another token."""
    async with (
        fake_gateway(then_close(4401)) as gateway,
        open_session(gateway.url, session_id="s1", token="abc") as session,
    ):
        with pytest.raises(SessionEnded) as ended:
            await take(session, 2)
    assert ended.value.code == 4401
    assert "abc" not in str(ended.value)


async def test_ends_when_fresh_tokens_are_refused(autojump_clock: MockClock) -> None:
    """Three more, then no more."""

    async def provide() -> str:
        return "abc"

    async with fake_gateway(401) as gateway:
        with pytest.raises(SessionEnded) as ended:
            async with open_session(gateway.url, session_id="s1", token_provider=provide):
                pass
    assert ended.value.code == 4401
    assert len(gateway.requests) == 4


async def test_provider_that_fails_is_asked_again(autojump_clock: MockClock) -> None:
    """The Auth Service may be behind the same dead network as the gateway."""
    failures = [OSError("secret words"), ValueError("secret words")]
    states: list[ConnectionState] = []

    async def provide() -> str:
        if failures:
            raise failures.pop()
        return "abc"

    async with (
        fake_gateway(stay) as gateway,
        open_session(gateway.url, session_id="s1", token_provider=provide, on_state=states.append),
    ):
        pass
    reasons = [state.reason for state in states if isinstance(state, Reconnecting)]
    assert reasons == ["no token: ValueError", "no token: OSError"]


async def test_internal_key_is_sent(autojump_clock: MockClock) -> None:
    """Services prove themselves by the key."""
    async with (
        fake_gateway(stay) as gateway,
        open_session(gateway.url, session_id="s1", internal_key="k"),
    ):
        pass
    assert gateway.requests[0]["headers"]["x-internal-auth"] == "k"


@pytest.mark.parametrize("wrong", ["a\r\nX: y", "ä"])
async def test_credentials_that_are_no_header_are_refused(wrong: str) -> None:
    """Before anything is sent, and without repeating them."""
    with pytest.raises(ValueError, match="printable") as error:
        async with open_session("http://127.0.0.1:1", session_id="s1", token=wrong):
            pass
    assert wrong not in str(error.value)


# ---------------------------------------------------------------------- life


async def test_leaving_acknowledges_and_closes(autojump_clock: MockClock) -> None:
    """The end of the block says 1000, with what was taken acknowledged."""
    seen: list[object] = []

    async def watch(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(token(1))
        seen.append(await peer.receive())
        seen.append(await peer.closed_with())

    async with fake_gateway(watch) as gateway:
        async with open_session(gateway.url, session_id="s1") as session:
            await take(session, 1)
        await trio.testing.wait_all_tasks_blocked()
    assert seen == [{"type": "ack", "seq": 1}, 1000]


async def test_leaving_does_not_wait_for_a_peer_that_is_gone(autojump_clock: MockClock) -> None:
    """The close handshake has a deadline."""

    async def ignore(stream: trio.SocketStream) -> None:
        client = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream, client, trio.open_nursery() as nursery:

            async def pump() -> None:
                while data := await client.receive_some():
                    await stream.send_all(data)

            nursery.start_soon(pump)
            await client.send_all(await stream.receive_some())
            await trio.sleep_forever()

    async with fake_gateway(stay) as gateway, trio.open_nursery() as nursery:
        port = int(gateway.url.rpartition(":")[2])
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, ignore, [listener])
        async with open_session(f"http://127.0.0.1:{listener.socket.getsockname()[1]}", session_id="s1"):
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(TransportSettings().close_timeout, abs=0.1)
        nursery.cancel_scope.cancel()


async def test_exception_in_the_block_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    """No group around it."""
    async with fake_gateway(stay) as gateway:
        with pytest.raises(KeyError, match="mine"):
            async with open_session(gateway.url, session_id="s1"):
                raise KeyError("mine")


async def test_cancellation_drops_the_socket(autojump_clock: MockClock) -> None:
    """A cancelled block ends at once."""
    async with fake_gateway(stay) as gateway:
        began = trio.current_time()
        with trio.move_on_after(1):
            async with open_session(gateway.url, session_id="s1") as session:
                await take(session, 1)
        assert trio.current_time() - began == pytest.approx(1)


async def test_two_readers_are_refused(autojump_clock: MockClock) -> None:
    """Each event once: two loops would share them by chance."""
    async with (
        fake_gateway(stay) as gateway,
        open_session(gateway.url, session_id="s1") as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(take, session, 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await take(session, 1)
        nursery.cancel_scope.cancel()


async def test_events_not_taken_are_bounded_and_none_is_lost(autojump_clock: MockClock) -> None:
    """A reader that stops taking costs bounded memory: the socket is not read, and not replaced."""
    sent = 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        # Virtual time does not wait for bytes in the kernel, so a pong may be given up and the socket
        # replaced; then the flood goes on where the client says, like a gateway's.
        resumes_after = re.search(r"last_seq=(\d+)", peer.path)
        seq = int(resumes_after[1]) if resumes_after else 0
        await peer.welcome(resumed=seq > 0)
        while seq < 60:
            seq += 1
            await peer.send(token(seq, "x" * (1 << 18)))
            sent = max(sent, seq)
        await peer.closed_with()

    async with fake_gateway(flood) as gateway, open_session(gateway.url, session_id="s1") as session:
        await trio.sleep(5)
        held = sent * (1 << 18)
        assert held < 12 << 20
        assert seqs(await take(session, 60)) == list(range(1, 61))
