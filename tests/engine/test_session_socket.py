"""A socket's place in its session's log: positions, windows, gaps, answers, endings."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.core.agent_events import AgentEvent
from gateway.core.client_messages import UserMessage
from gateway.core.effects import Accepted, StartTurn
from gateway.core.events import EventKind
from gateway.core.flow import Flow
from gateway.core.limits import Limits
from gateway.core.session import Sender, Session
from gateway.core.websocket_protocol import Dialect
from gateway.engine.session_runner import SessionRunner
from gateway.engine.session_socket import MAX_WAITING_ANSWERS, SessionSocket
from gateway.ports import ResumePoint
from tests.engine.fakes import Bench, FakeConnection, RecordingTelemetry, TrioClock, user_message

V1, V2 = Dialect.V1, Dialect.V2_JSON
Mock = trio.testing.MockClock


class Stage:
    """A session in memory with a running turn, and sockets on it, without a hub or a connection's tasks."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        ids = iter(f"id{number}" for number in range(1000))
        self.session = Session("s", limits=self.limits, new_id=lambda: next(ids), keeps_commits=False)
        self.runner = SessionRunner(
            self.session,
            limits=self.limits,
            run_turn=_no_turn,
            group_commit=None,
            telemetry=RecordingTelemetry(),
            clock=TrioClock(),
            linger=0.0,
            was_stored=False,
            start_branch=lambda _: None,
            retired=lambda _: None,
            flow=Flow(),
        )
        self.session.receive(UserMessage(None, b"{}"), Sender("ada", "r", False), 0.0)
        self.runner.changed()

    def socket(
        self, dialect: Dialect = V2, resume: ResumePoint | None = None
    ) -> tuple[SessionSocket, FakeConnection]:
        """A socket that has joined."""
        connection = FakeConnection()
        socket = SessionSocket(connection, self.runner, dialect, self.limits)
        socket.join(resume, had_session=True)
        return socket, connection

    def token(self, text: str) -> None:
        """The agent says something."""
        data = b'{"type":"assistant_message","token":"%b","is_final":false}' % text.encode()
        assert self.session.turn_id is not None
        self.session.agent_event(
            self.session.turn_id, AgentEvent(EventKind.TOKEN, "assistant_message", data, text)
        )
        self.runner.changed()


async def _no_turn(runner: SessionRunner, start: StartTurn) -> None:
    await trio.sleep_forever()


async def test_a_token_goes_out_at_once_without_a_task() -> None:
    """Each socket has it when the event is made visible, in its own dialect."""
    stage = Stage()
    (_, new), (_, old) = stage.socket(), stage.socket(V1)
    stage.token("a")
    assert new.objects()[-1] == {"seq": 2, "type": "assistant_message", "token": "a", "is_final": False}
    assert old.objects() == [{"type": "assistant_message", "token": "a", "is_final": False}]


async def test_answers_wait_for_a_blocked_socket_and_go_before_events() -> None:
    """Control overtakes what is waiting, but never what was given already."""
    stage = Stage()
    socket, connection = stage.socket()
    connection.stalled = True
    stage.token("given")
    stage.token("waiting")
    socket.answer(Accepted("m", "t"))
    connection.unstall()
    socket._blocked = False  # what the flusher does
    socket.flush_nowait()
    assert [item.get("token", item["type"]) for item in connection.objects()] == [
        "welcome",
        "given",
        "ack",
        "waiting",
    ]


async def test_resuming_at_the_newest_event_replays_nothing() -> None:
    """The client has all there is, and gets exactly what comes next."""
    stage = Stage()
    stage.token("a")
    _, connection = stage.socket(resume=ResumePoint(stage.session.epoch, 2))
    stage.token("b")
    assert [item.get("token", item["type"]) for item in connection.objects()] == ["welcome", "b"]
    assert connection.objects()[0]["resumed"] is True


async def test_an_ack_counts_for_no_more_than_was_sent() -> None:
    """A seq of the future, or of an epoch that is gone, is the newest that this socket was given."""
    stage = Stage()
    socket, _ = stage.socket()
    stage.token("a")
    socket.acknowledge(10**9)
    assert (socket.acked, socket.position) == (2, 2)
    socket.acknowledge(1)
    assert socket.acked == 2


async def test_an_ack_on_a_socket_that_is_blocked_is_just_an_ack(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It neither ends the socket nor is it lost."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    await trio.testing.wait_all_tasks_blocked()
    socket.stalled = True
    stream.token("a")
    await trio.testing.wait_all_tasks_blocked()
    socket.say({"type": "ack", "seq": 1})
    await trio.testing.wait_all_tasks_blocked()
    socket.unstall()
    stream.token("b")
    await trio.testing.wait_all_tasks_blocked()
    assert (socket.text(), socket.closed) == ("ab", None)


async def test_a_full_window_stops_events_but_not_answers() -> None:
    """Unacknowledged data is bounded per socket; an ack opens the window again."""
    stage = Stage(Limits(unacked_bytes=1_000))
    socket, connection = stage.socket()
    for _ in range(20):
        stage.token("x" * 100)
    given = socket.position
    assert given < 10
    socket.answer(Accepted("m", "t"))
    assert connection.types()[-1] == "ack"
    socket.acknowledge(given)
    assert socket.position > given


async def test_v1_takes_up_where_the_dead_socket_left_off() -> None:
    """Exactly what had not left the process; an event that was taken is never given again."""
    stage = Stage()
    socket, connection = stage.socket(V1)
    stage.token("a")
    connection.stalled = True
    stage.token("b")
    stage.token("c")
    socket.leave()
    _, back = stage.socket(V1)
    assert (connection.text(), back.text()) == ("a", "bc")


async def test_an_answer_that_waits_puts_no_event_in_doubt() -> None:
    """A socket that dies while only an ack waits for the kernel had received its last token."""
    stage = Stage()
    socket, connection = stage.socket(V1)
    stage.token("a")
    connection.stalled = True
    socket.answer(Accepted("m", "t"))
    assert socket.confirmed_seq == 2
    socket.leave()
    _, back = stage.socket(V1)
    stage.token("b")
    assert (connection.text(), back.text()) == ("a", "b")


async def test_events_given_to_a_connection_that_is_known_lost_are_not_lost() -> None:
    """What ``send_nowait`` refused belongs to the next socket."""
    stage = Stage()
    socket, connection = stage.socket(V1)
    connection.drop()
    stage.token("a")
    stage.token("b")
    socket.leave()
    _, back = stage.socket(V1)
    assert back.text() == "ab"


async def test_a_socket_that_has_left_is_given_nothing() -> None:
    """An answer that comes late must not carry events that the next socket will be given."""
    stage = Stage()
    socket, connection = stage.socket(V1)
    socket.leave()
    stage.token("a")
    socket.answer(Accepted("m", "t"))
    socket.flush_nowait()
    assert connection.frames == []
    assert stage.socket(V1)[1].text() == "a"


async def test_v1_is_told_of_a_gap_even_when_the_first_telling_was_lost() -> None:
    """The notice dies with its socket, the gap does not: the next socket is told again."""
    stage = Stage(Limits(replay_events=5))
    socket, connection = stage.socket(V1)
    connection.stalled = True
    for number in range(20):
        stage.token(f"{number}.")
    socket.leave()
    dead = FakeConnection()
    dead.stalled = True
    second = SessionSocket(dead, stage.runner, V1, stage.limits)
    second.join(None, had_session=True)
    second.leave()
    _, third = stage.socket(V1)
    assert third.objects()[0]["code"] == "REPLAY_TRUNCATED"
    assert third.text().endswith("18.19.")


async def test_a_gap_is_a_snapshot_for_an_attached_v2_socket() -> None:
    """What was trimmed before it could be sent is replaced, with the text so far, and said."""
    stage = Stage(Limits(replay_events=5))
    socket, connection = stage.socket()
    connection.stalled = True
    for number in range(20):
        stage.token(f"{number}.")
    connection.unstall()
    socket._blocked = False  # what the flusher does
    socket.flush_nowait()
    snapshot = connection.objects()[-1]
    assert (snapshot["type"], snapshot["reason"], snapshot["seq"]) == ("snapshot", "trimmed", 21)
    assert snapshot["text"] == "".join(f"{number}." for number in range(20))


async def test_who_asks_without_reading_is_cut_off() -> None:
    """Answers that nobody takes are bounded too: a flood of them costs no memory to speak of."""
    stage = Stage()
    socket, connection = stage.socket()
    connection.stalled = True
    started: list[str] = []
    socket.begin(lambda: started.append("flusher"))
    for number in range(MAX_WAITING_ANSWERS + 1):
        socket.answer(Accepted(f"m{number}", "t"))
    assert await socket.flush() == (4413, "too slow: answers are not taken; resume when ready")
    assert started


@pytest.mark.parametrize("dialect", [V1, V2])
async def test_no_progress_into_the_kernel_is_4413(
    nursery: trio.Nursery, autojump_clock: Mock, dialect: Dialect
) -> None:
    """Counted from the last payload that went out, not from the first that waited."""
    bench = await Bench(nursery, limits=Limits(send_timeout=10)).start()
    socket = bench.connect(dialect=dialect)
    await trio.testing.wait_all_tasks_blocked()
    bench.connect(dialect=V2).say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    socket.stalled = True
    stream.emit(*[{"type": "plan_update", "n": number, "x": "y" * 70_000} for number in range(3)])
    await trio.sleep(9)
    socket._held.pop(0)
    await trio.sleep(9)
    assert socket.closed is None
    await trio.sleep(4)
    assert socket.closed is not None
    assert socket.closed[0] == 4413


async def test_the_first_ending_decides() -> None:
    """A socket is closed once, with the first reason."""
    stage = Stage()
    socket, _ = stage.socket()
    socket.begin(lambda: None)
    socket.end(1012, "restarting")
    socket.end(4413, "too slow")
    assert await socket.flush() == (1012, "restarting")
