"""The delivery guarantees themselves, over whatever Hypothesis does to sockets, store, agent and process.

Each example is a program of steps, run in a Trio run of its own with virtual time; ``wire_checker`` reads
along as the clients would. CI runs the same programs every time;
``DELIVERY_EXAMPLES=5000`` in the environment asks for so many new ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from typing import Any

import hypothesis.strategies as st
import msgspec
import orjson
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from gateway.core.errors import AgentStreamInterrupted
from gateway.core.identity import Identity
from gateway.core.limits import Limits
from gateway.core.rate_limit import RateLimiter
from gateway.core.sse import ServerSentEvent
from gateway.core.storage import SessionCommit
from gateway.core.websocket_protocol import Dialect
from gateway.engine.admission import AdmissionRules, Admissions
from gateway.engine.hub import Hub
from gateway.engine.turn import TurnRunner
from gateway.ports import Admission, AgentRuntime, AgentStream, ResumePoint, TurnRequest
from tests.engine.fakes import (
    DurableMemoryStore,
    FakeAuthenticator,
    FakeConnection,
    RecordingTelemetry,
    TrioClock,
)
from tests.engine.wire_checker import Facts, V1Checker, V2Checker, message_key

EXAMPLES = os.environ.get("DELIVERY_EXAMPLES")
LIMITS = Limits(
    replay_events=30,
    replay_total_bytes=4_000,
    unacked_bytes=6_000,
    merge_bytes=600,
    max_queued_messages=3,
    send_timeout=4.0,
    detach_grace=30.0,
    heartbeat_interval=10_000.0,
    queue_timeout=20.0,
    max_concurrent_turns=1,
)


class ScriptedTurn:
    """One turn as the agent lives it."""

    def __init__(self, number: int, *, resumable: bool) -> None:
        self.number = number
        self.resumable = resumable
        self.events: list[dict[str, object]] = []
        self.tokens = 0
        self.is_finished = False
        self.readers = 0
        self.cut = False
        self.changed = trio.lowlevel.ParkingLot()

    def emit(self, event: dict[str, object]) -> None:
        """One event more."""
        self.events.append(event)
        self.changed.unpark_all()


class ScriptedStream(AgentStream):
    """One answer: the events of a turn from a place on."""

    def __init__(self, turn: ScriptedTurn, at: int) -> None:
        self._turn = turn
        self._at = at
        self._said_done = False

    @property
    def resumable(self) -> bool:
        """As the turn is."""
        return self._turn.resumable

    async def receive(self) -> Sequence[ServerSentEvent]:
        """What has come since the last call."""
        turn = self._turn
        while True:
            await trio.lowlevel.checkpoint()
            if turn.cut:
                turn.cut = False
                raise AgentStreamInterrupted("The answer was cut.")
            if new := turn.events[self._at : self._at + 8]:
                first = self._at + 1
                self._at += len(new)
                return [
                    ServerSentEvent("message", orjson.dumps(event), str(number) if turn.resumable else None)
                    for number, event in enumerate(new, first)
                ]
            if turn.is_finished:
                if self._said_done:
                    return []
                self._said_done = True
                return [ServerSentEvent("done", b'{"status":"completed"}')]
            await turn.changed.park()


class ScriptedAgent(AgentRuntime):
    """A runtime that outlives gateways, and remembers every POST."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.turns: dict[str, ScriptedTurn] = {}
        self.turn_of_message: dict[str, str] = {}
        self.resumable = False

    def open_stream(self, request: TurnRequest) -> AbstractAsyncContextManager[AgentStream]:
        """See the port."""
        return self._open(request)

    @asynccontextmanager
    async def _open(self, request: TurnRequest) -> AsyncIterator[AgentStream]:
        await trio.lowlevel.checkpoint()
        turn = self.turns.get(request.turn_id)
        if turn is None:
            key = self._facts.key(message_key(request.message))
            earlier = self.turn_of_message.setdefault(key, request.turn_id)
            assert earlier == request.turn_id, f"{key} was POSTed as {earlier} and as {request.turn_id}"
            assert request.turn_id not in self._facts.outcomes, "a turn was POSTed after its end was told"
            turn = self.turns[request.turn_id] = ScriptedTurn(len(self.turns), resumable=self.resumable)
            self._facts.turn_numbers[request.turn_id] = turn.number
        else:
            assert turn.resumable, f"{request.turn_id} was POSTed twice"
        turn.readers += 1
        assert turn.readers == 1, "two streams of one turn"
        try:
            yield ScriptedStream(turn, int(request.last_event_id or 0))
        finally:
            turn.readers -= 1

    def running(self) -> list[ScriptedTurn]:
        """Turns whose stream somebody reads and that are not finished."""
        return [turn for turn in self.turns.values() if turn.readers and not turn.is_finished]


class CrashingStore(DurableMemoryStore):
    """Takes its time before and after it has stored: a crash can come in either."""

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Store, then report late."""
        await super().commit(commits)
        await trio.sleep(self.latency)


class Gateway:
    """One life of the gateway process."""

    def __init__(self, store: DurableMemoryStore, agent: ScriptedAgent, new_id: Callable[[], str]) -> None:
        clock, authenticator = TrioClock(), FakeAuthenticator()
        self.telemetry = RecordingTelemetry()
        self.over = trio.Event()
        self.hub = Hub(
            store=store,
            admissions=Admissions(
                rules=AdmissionRules(),
                authenticator=authenticator,
                store=store,
                upgrade_rate=RateLimiter(0),
                clock=clock,
                fresh_bytes=bytes,
            ),
            authenticator=authenticator,
            run_turn=TurnRunner(agent, limits=LIMITS, telemetry=self.telemetry, randomness=random.Random(1)),
            limits=LIMITS,
            telemetry=self.telemetry,
            clock=clock,
            new_id=new_id,
            message_rate=RateLimiter(0),
            randomness=random.Random(1),
        )

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Until it is killed."""
        try:
            async with trio.open_nursery() as self.nursery:
                await self.nursery.start(self.hub.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self.over.set()

    async def kill(self) -> None:
        """What was not stored is gone."""
        self.nursery.cancel_scope.cancel()
        await self.over.wait()


class Client:
    """One device: at most one socket at a time, with whatever it has to send again."""

    def __init__(self, world: World, name: str, dialect: Dialect) -> None:
        self.world, self.name, self.dialect = world, name, dialect
        self.socket: FakeConnection | None = None
        self.checker: V1Checker | V2Checker = (
            V2Checker(world.facts) if dialect.is_v2 else V1Checker(world.facts)
        )
        self.read = 0
        self.is_reading = True
        self.sent: list[dict[str, object]] = []
        self.unanswered: dict[str, dict[str, object]] = {}
        self.last_answers: dict[str, tuple[str, str | None]] = {}

    def connect(self, *, ahead: bool = False) -> None:
        """Open a socket; v2 resumes where it is, or claims to be ahead of everyone."""
        if self.socket is not None:
            return
        self.socket, self.read, self.is_reading = FakeConnection(), 0, True
        resume = None
        if isinstance(self.checker, V2Checker):
            if self.checker.epoch is not None:
                resume = ResumePoint(self.checker.epoch, self.checker.seq + (1_000 if ahead else 0))
            self.checker.connected(None if resume is None else (resume.epoch, resume.last_seq))
        admission = Admission("s", Identity("anonymous"), self.dialect, resume, "203.0.113.1", "r")
        gateway = self.world.gateway
        gateway.nursery.start_soon(gateway.hub.serve, self.socket, admission)
        for message in self.unanswered.values():
            self.say(message)

    def say(self, *messages: dict[str, object]) -> None:
        """Send messages, as one frame where the protocol has batches."""
        if self.socket is None or self.socket.closed is not None or self.socket.lost is not None:
            return
        if not self.dialect.is_v2:
            for message in messages:
                self.socket.say(message)
        elif self.dialect.is_binary:
            self.socket.say(msgspec.msgpack.encode(list(messages)))
        else:
            self.socket.say(orjson.dumps(list(messages)).decode())

    def send(self, **message: object) -> None:
        """A new message: v1 sends it once, v2 until it is answered."""
        if self.socket is None:
            return
        if self.dialect.is_v2:
            message["id"] = f"{self.name}{len(self.sent)}"
            self.unanswered[str(message["id"])] = message
        self.sent.append(message)
        self.say(message)

    def take_in(self, *, but: int = 0) -> None:
        """Read what has arrived, but for the last frames."""
        socket = self.socket
        if socket is None or not self.is_reading:
            return
        upto = max(self.read, len(socket.frames) - but)
        for frame in socket.frames[self.read : upto]:
            value = msgspec.msgpack.decode(frame) if self.dialect.is_binary else orjson.loads(frame)
            for item in value if isinstance(value, list) else [value]:
                self.checker.see(item)
                if item["type"] in ("ack", "nack") and "id" in item:
                    self.last_answers[item["id"]] = (
                        item.get("status", item.get("code")),
                        item.get("turn_id"),
                    )
                    self.answered(item)
        self.read = upto
        if socket.closed is not None:
            self.socket = None

    def answered(self, item: dict[str, Any]) -> None:
        """A message of its own has its answer; one that may be tried again will be."""
        if item["type"] == "nack" and item["code"] == "STORE_UNAVAILABLE":
            return
        message = self.unanswered.pop(item["id"], None)
        if message is not None and item["type"] == "ack":
            self.world.acked[item["id"]] = (message, item.get("turn_id"))

    async def lose(self, frames: int) -> None:
        """The connection is gone, and with it what was on its way."""
        if self.socket is None:
            return
        if self.dialect.is_v2:
            self.take_in(but=frames)
        self.socket.drop()
        await trio.testing.wait_all_tasks_blocked()
        if not self.dialect.is_v2:
            # What a dead v1 socket was given counts as given.
            self.take_in()
        self.socket = None


class World:
    """A session's clients, its gateway, its store and its agent."""

    def __init__(self, nursery: trio.Nursery, *, durable: bool) -> None:
        self.nursery = nursery
        self.facts = Facts(durable)
        self.agent = ScriptedAgent(self.facts)
        self.store = CrashingStore()
        self.acked: dict[str, tuple[dict[str, object], str | None]] = {}
        self.calls: list[str] = []
        self._numbers = count(1)
        self.clients = [
            Client(self, "a", Dialect.V2_JSON),
            Client(self, "b", Dialect.V2_MSGPACK),
            Client(self, "old", Dialect.V1),
        ]

    async def start(self) -> None:
        """Start a gateway on what the store holds."""
        self.facts.lives += 1
        if not self.facts.durable:
            self.store = _Forgetful()
        await self.store.claim("s", "anonymous", 0)
        self.gateway = Gateway(self.store, self.agent, lambda: f"id{next(self._numbers)}")
        await self.nursery.start(self.gateway.run)

    async def restart(self) -> None:
        """Kill the gateway, whatever it is doing, and start it again."""
        await self.gateway.kill()
        for client in self.clients:
            client.is_reading = True
            client.take_in()
            client.socket = None
            if isinstance(client.checker, V1Checker):
                client.checker.may_miss = True
        self.store.down, self.store.latency = False, 0.0
        if not self.facts.durable:
            self.acked.clear()
        await self.start()

    def take_in(self) -> None:
        """All clients read."""
        for client in self.clients:
            client.take_in()
        assert not self.gateway.telemetry.errors() or all(
            event in ("store_unavailable",)
            for level, event, _ in self.gateway.telemetry.entries
            if level == "error"
        ), self.gateway.telemetry.errors()

    async def do(self, step: str, who: int, much: int) -> None:
        """One step of the program."""
        client = self.clients[who]
        running = self.agent.running()
        if step == "connect":
            client.connect()
        elif step == "ahead":
            client.connect(ahead=much == 1)
        elif step == "lose":
            await client.lose(much)
        elif step == "stall" and client.socket is not None:
            client.socket.stalled = True
        elif step == "unstall" and client.socket is not None:
            client.socket.unstall()
        elif step == "nap":
            client.is_reading = not client.dialect.is_v2
        elif step == "wake":
            client.is_reading = True
        elif step == "ask":
            for _ in range(1 + much % 2):
                client.send(type="user_message", content=f"{client.name}:{len(client.sent)}")
        elif step == "again" and client.sent and client.dialect.is_v2:
            client.say(*[client.sent[(much + at) % len(client.sent)] for at in range(2)])
        elif step == "decide" and self.calls:
            decision = ("approve", "reject")[much % 2]
            client.send(
                type="hitl_decision", call_id=self.calls[-1 - much % len(self.calls)], decision=decision
            )
        elif step == "result" and self.calls:
            result = f"{client.name}:{len(client.sent)}"
            client.send(type="tool_result", call_id=self.calls[-1], result=result)
        elif step == "cancel":
            client.send(type="cancel")
        elif step == "ack" and isinstance(client.checker, V2Checker):
            client.say({"type": "ack", "seq": client.checker.seq if much else 10**9})
        elif step == "resumable":
            self.agent.resumable = much % 2 == 0
        elif step == "tokens" and running:
            self.emit_tokens(running[-1], (1, 2, 5, 10, 45)[much])
        elif step == "call" and running:
            self.emit_call(running[-1], approval=much % 2 == 0)
        elif step == "round":
            client.send(type="user_message", content=f"{client.name}:{len(client.sent)}")
            await trio.sleep(0.02)
            for turn in self.agent.running():
                self.emit_tokens(turn, much)
                self.emit_call(turn, approval=True)
                self.finish(turn)
        elif step == "race" and self.calls:
            for rival, decision in zip(self.clients, ("approve", "reject", "approve"), strict=True):
                rival.send(type="hitl_decision", call_id=self.calls[-1], decision=decision)
        elif step == "blink":
            await client.lose(much)
            client.connect()
        elif step == "regret":
            client.send(type="user_message", content=f"{client.name}:{len(client.sent)}")
            if much % 2:
                await trio.sleep(0.002)
            client.send(type="cancel")
        elif step == "finish" and running:
            self.finish(running[-1])
        elif step == "cut" and running:
            running[-1].cut = True
            running[-1].changed.unpark_all()
        elif step == "wait":
            await trio.sleep((0.001, 0.01, 1.0, 5.0, 40.0)[much % 5])
        elif step == "slow":
            self.store.latency = (0.0, 0.005, 0.5)[much % 3]
            self.store.at_once = much % 2 == 0
        elif step == "down":
            self.store.down = much % 2 == 0
        elif step == "kill":
            await self.restart()

    def emit_tokens(self, turn: ScriptedTurn, number: int) -> None:
        """So many tokens, each by its name."""
        for _ in range(number):
            token = f"{turn.number}.{turn.tokens};"
            turn.tokens += 1
            turn.emit({"type": "assistant_message", "token": token, "is_final": False})

    def emit_call(self, turn: ScriptedTurn, *, approval: bool) -> None:
        """A new call."""
        self.calls.append(f"c{len(self.calls)}")
        turn.emit({"type": "tool_call", "call_id": self.calls[-1], "requires_approval": approval})

    def finish(self, turn: ScriptedTurn) -> None:
        """The agent has said all."""
        turn.is_finished = True
        self.facts.finished[turn.number] = turn.tokens
        turn.changed.unpark_all()

    def note_missable(self, started: float) -> None:
        """A v1 client that stayed away for the grace is promised nothing of what came before."""
        old = self.clients[2]
        if old.socket is None and trio.current_time() > started and isinstance(old.checker, V1Checker):
            old.checker.may_miss |= trio.current_time() - started >= LIMITS.detach_grace

    async def come_to_rest(self) -> None:
        """Everything works again, all come back, and every turn is brought to its end."""
        self.store.down, self.store.latency = False, 0.0
        quiet = 0
        for _ in range(60):
            for client in self.clients:
                client.is_reading = True
                if client.socket is not None:
                    client.socket.unstall()
                client.take_in()
                client.connect()
                if isinstance(client.checker, V2Checker):
                    client.say({"type": "ack", "seq": client.checker.seq}, *client.unanswered.values())
            for turn in self.agent.running():
                self.finish(turn)
            await trio.sleep(1.0)
            self.take_in()
            waits = any(client.socket is None or client.unanswered for client in self.clients)
            quiet = 0 if waits or self.agent.running() else quiet + 1
            if quiet == 3:
                return
        pytest.fail("it never comes to rest")

    async def check_end(self) -> None:
        """What only can be said when all is over."""
        facts = self.facts
        auditor = Client(self, "auditor", Dialect.V2_JSON)
        assert isinstance(auditor.checker, V2Checker)
        first = self.clients[0].checker
        assert isinstance(first, V2Checker)
        auditor.checker.epoch = first.epoch
        auditor.connect()
        await trio.sleep(1.0)
        auditor.take_in()
        for client in self.clients:
            assert client.socket is not None
            assert not client.unanswered, f"{client.unanswered} were never answered"
            if isinstance(client.checker, V2Checker):
                theirs = (auditor.checker.epoch, auditor.checker.seq)
                assert (client.checker.epoch, client.checker.seq) == theirs, "the end of the log is missing"
            else:
                client.checker.complete_until(len(self.agent.turns))
        winners: dict[str, list[str]] = {}
        for key, (message, turn_id) in self.acked.items():
            if turn_id is None:
                continue
            outcome = facts.outcomes.get(turn_id)
            was_posted = turn_id in self.agent.turns
            if message["type"] == "cancel":
                assert outcome in (None, "cancelled"), f"{key} cancelled a turn that {outcome}"
                continue
            if not self.saw_gaps():
                assert outcome is not None or was_posted, f"{key} was acknowledged and lost"
            if not was_posted:
                assert outcome in (None, "cancelled", "outcome_unknown", "failed"), f"{key}: {outcome}"
            if message["type"] == "hitl_decision":
                winners.setdefault(str(message["call_id"]), []).append(key)
                assert (
                    facts.decided.get(facts.key(str(message["call_id"])), message["decision"])
                    == message["decision"]
                )
        assert all(len(keys) == 1 for keys in winners.values()), f"two winners: {winners}"
        await self._send_all_again(auditor)

    def saw_gaps(self) -> bool:
        """Whether every device was given a snapshot in place of some events."""
        return all(client.checker.snapshots for client in self.clients if client.dialect.is_v2)

    async def _send_all_again(self, auditor: Client) -> None:
        """Every acknowledged id once more, from another device: the same answers, and no work."""
        posted = len(self.agent.turns)
        for start in range(0, len(self.acked), 2):
            auditor.say(*[message for message, _ in list(self.acked.values())[start : start + 2]])
        await trio.sleep(1.0)
        auditor.take_in()
        for key, (_, turn_id) in self.acked.items():
            assert auditor.last_answers.get(key) == ("duplicate", turn_id), f"{key} was done again"
        assert len(self.agent.turns) == posted


class _Forgetful(CrashingStore):
    """A store that keeps nothing: the engine holds its sessions itself."""

    @property
    def is_durable(self) -> bool:
        """No."""
        return False


async def _run(program: list[tuple[str, int, int, int]], *, durable: bool) -> World:
    async with trio.open_nursery() as nursery:
        world = World(nursery, durable=durable)
        await world.start()
        away_since = 0.0
        for step, who, much, pause in program:
            await world.do(step, who, much)
            if pause == 1:
                await trio.testing.wait_all_tasks_blocked()
            elif pause == 2:
                await trio.sleep(0.01)
            world.take_in()
            if world.clients[2].socket is not None:
                away_since = trio.current_time()
            world.note_missable(away_since)
        await world.come_to_rest()
        await world.check_end()
        nursery.cancel_scope.cancel()
    return world


def run(program: list[tuple[str, int, int, int]], *, durable: bool) -> World:
    """Run a program to its end in virtual time; a violation is an AssertionError."""
    try:
        return trio.run(
            lambda: _run(program, durable=durable), clock=trio.testing.MockClock(autojump_threshold=0)
        )
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise cause from None


STEPS = (
    ["connect"] * 4
    + ["tokens"] * 6
    + ["ask"] * 3
    + ["round", "race", "blink", "regret", "finish", "wait"] * 2
    + ["lose", "stall", "unstall", "nap", "wake", "again", "cancel", "call", "decide", "result", "ack", "ack"]
    + ["resumable", "cut", "slow", "slow", "down", "kill", "ahead"]
)
steps = st.tuples(st.sampled_from(STEPS), st.integers(0, 2), st.integers(0, 4), st.integers(0, 2))
START = [
    ("connect", 0, 0, 2),
    ("connect", 1, 0, 2),
    ("connect", 2, 0, 2),
    ("ask", 0, 0, 2),
    ("tokens", 0, 1, 2),
]


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "memory"])
def test_the_delivery_guarantees_hold_whatever_happens(durable: bool) -> None:
    """No loss, repeat, reorder, silent gap or second winner, for any program of steps."""

    @settings(
        max_examples=int(EXAMPLES or 200),
        derandomize=EXAMPLES is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(steps, min_size=20, max_size=60))
    def holds(program: list[tuple[str, int, int, int]]) -> None:
        run(START + program, durable=durable)

    holds()
