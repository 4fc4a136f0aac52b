"""What the supervisor does when workers live, die, hang and ask; the workers are stand-ins for processes."""

from __future__ import annotations

import errno
import itertools
import random
import socket
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from gateway.config import load_configuration
from gateway.node_ports import ASK_METRICS
from gateway.workers.channel import Answer, Answers, Asking, Leaving, Listening, Message, Question
from gateway.workers.supervisor import (
    HANG_SECONDS,
    LOOK_SECONDS,
    MOST_FAILURES,
    STABLE_SECONDS,
    Supervisor,
)
from gateway.workers.worker_process import Place
from tests.adapters.socket_harness import RecordingTelemetry

Mock = trio.testing.MockClock
SIGKILLED = -9


class FakeWorker:
    """Lives until the test ends it; listens at once, and ends when asked to, unless told otherwise."""

    def __init__(
        self, number: int, started_at: float, sockets: Sequence[socket.socket], *, hangs: bool
    ) -> None:
        self.number = number
        self.pid = 1000 + number
        self.started_at = started_at
        self.sockets = [each.fileno() for each in sockets]
        self.heard: list[Message] = []
        self.told = trio.Event()
        self.was_asked_to_stop = False
        self.answers = True
        self.say: Callable[[Message], None] | None = None
        self._hangs = hangs
        self._ended = trio.Event()
        self._code = 0

    def post(self, message: Message) -> None:
        """Remember it; whether it is alive it answers by itself."""
        if isinstance(message, Question) and message.question == "alive":
            if self.answers and self.say is not None:
                self.say(Answer(message.number, None))
            return
        self.heard.append(message)
        self.told.set()

    def ask_to_stop(self) -> None:
        """Obey, or not."""
        self.was_asked_to_stop = True
        if not self._hangs:
            self.end(0)

    def kill(self) -> None:
        """``kill -9``."""
        self.end(SIGKILLED)

    def end(self, code: int) -> None:
        """The process ends."""
        self._code = code
        self._ended.set()

    async def run(self, take: Callable[[Message], None]) -> int:
        """Until the end."""
        self.say = take
        await self._ended.wait()
        return self._code


class Bench:
    """A supervisor with such workers."""

    def __init__(self, workers: int = 2, *, listens: bool = True, hangs: bool = False) -> None:
        self.telemetry = RecordingTelemetry()
        self.started: list[FakeWorker] = []
        self.announced: list[Sequence[str]] = []
        self.stop = trio.Event()
        self.listens = listens
        self.hangs = hangs
        self.code: int | None = None
        self.over = trio.Event()
        self.dies_at_once: int | None = None
        self.refusal: OSError | None = None
        self.supervisor = Supervisor(
            load_configuration(
                {"GATEWAY__STORE_URL": "redis://127.0.0.1/0", "GATEWAY__WORKERS": str(workers)},
                dotenv=None,
                bind="127.0.0.1:0",
            ),
            self.telemetry,
            render_metrics=lambda: b"of the supervisor",
            announce=self.announced.append,
            randomness=random.Random(1),
            start_worker=self._start,
        )

    async def _start(self, place: Place) -> FakeWorker:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        worker = FakeWorker(place.number, trio.current_time(), place.sockets, hangs=self.hangs)
        self.started.append(worker)
        if self.dies_at_once is not None:
            worker.end(self.dies_at_once)
        return worker

    async def run(self) -> None:
        """In the background of a test."""
        self.code = await self.supervisor.run(self.stop)
        self.over.set()

    async def settle(self) -> None:
        """Let everything happen that can; every worker listens that was started."""
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            for worker in self.living():
                if self.listens and worker.say is not None and not hasattr(worker, "listened"):
                    worker.listened = True  # type: ignore[attr-defined]
                    worker.say(Listening(["http://127.0.0.1:1"]))
        await trio.testing.wait_all_tasks_blocked()

    def living(self) -> list[FakeWorker]:
        """The last that was started in each seat, in the order of their numbers."""
        last = {worker.number: worker for worker in self.started}
        return [last[number] for number in sorted(last)]


async def test_says_where_it_listens_when_all_do(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Once, and the first worker alone is started first: what is wrong is said once."""
    bench = Bench(3, listens=False)
    nursery.start_soon(bench.run)
    await bench.settle()
    assert [worker.number for worker in bench.started] == [1]
    bench.listens = True
    await bench.settle()

    assert sorted(worker.number for worker in bench.started) == [1, 2, 3]
    assert bench.announced == [["http://127.0.0.1:1"]]
    bench.stop.set()


async def test_stops_all_at_the_same_time(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Every worker is asked, and the exit code is 0."""
    bench = Bench(3)
    nursery.start_soon(bench.run)
    await bench.settle()
    bench.stop.set()
    await bench.settle()

    assert [worker.was_asked_to_stop for worker in bench.started] == [True] * 3
    assert bench.code == 0


async def test_kills_who_does_not_end(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Twice the drain timeout and five seconds later; then the exit code is not 0."""
    bench = Bench(2, hangs=True)
    nursery.start_soon(bench.run)
    await bench.settle()
    bench.stop.set()
    await trio.sleep(24.9)
    assert bench.code is None
    await trio.sleep(0.2)

    assert bench.code == 1
    assert bench.telemetry.errors == ["worker_killed", "worker_killed"]


async def test_a_worker_that_was_well_is_started_again_at_once(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """On the same socket, in which connections wait for it."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    await trio.sleep(STABLE_SECONDS)
    died_at = trio.current_time()
    bench.started[0].kill()
    await bench.settle()

    again = bench.started[2]
    assert (again.number, again.started_at) == (1, died_at)
    assert again.sockets == bench.started[0].sockets
    assert bench.telemetry.counts[("gateway_worker_restarts_total", (("worker", "1"),))] == 1
    bench.stop.set()


async def test_a_worker_that_dies_soon_is_started_less_and_less_often(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """After 0.5 s, 1, 2 … (and a little less); after six in a row everything ends with its exit code."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    bench.dies_at_once = 70
    bench.started[0].end(70)
    with trio.fail_after(30):
        await bench.over.wait()

    times = [worker.started_at for worker in bench.started if worker.number == 1]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == MOST_FAILURES
    assert all(0.8 * due <= pause <= due for pause, due in zip(pauses, (0.5, 1, 2, 4, 8), strict=True))
    assert bench.code == 70
    assert bench.started[1].was_asked_to_stop
    assert "worker_given_up" in bench.telemetry.errors


async def test_no_memory_for_a_process_is_a_failure_of_one_worker(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It is tried again, later and later; the others go on."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    await trio.sleep(STABLE_SECONDS)
    bench.refusal = OSError(errno.ENOMEM, "Cannot allocate memory")
    bench.started[0].kill()
    await trio.sleep(1)
    bench.refusal = None
    await trio.sleep(2)

    assert [worker.number for worker in bench.started] == [1, 2, 1]
    assert bench.telemetry.errors.count("worker_not_started") == 2
    assert not bench.started[1].was_asked_to_stop
    bench.stop.set()


async def test_a_start_that_fails_is_not_repeated(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """What prevents the first worker from starting prevents the gateway, with the same exit code."""
    bench = Bench(4)
    bench.dies_at_once = 78
    nursery.start_soon(bench.run)
    await bench.settle()

    assert bench.code == 78
    assert len(bench.started) == 1
    assert bench.announced == []


async def test_a_signal_at_the_start_is_a_failure(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """An exit code cannot be negative."""
    bench = Bench()
    bench.dies_at_once = SIGKILLED
    nursery.start_soon(bench.run)
    await bench.settle()

    assert bench.code == 1


async def test_a_worker_that_leaves_gets_no_more_connections(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It was asked to stop by somebody else; the next one in its seat has a socket of its own again."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    await trio.sleep(STABLE_SECONDS)
    first = bench.started[0]
    assert first.say is not None
    first.say(Leaving())
    with pytest.raises(OSError, match="Bad file"):
        socket.socket(fileno=first.sockets[0]).detach()
    first.end(0)
    await bench.settle()

    assert [worker.number for worker in bench.started] == [1, 2, 1]
    assert len(bench.started[2].sockets) == 1
    bench.stop.set()


async def test_a_worker_that_hangs_is_killed(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Half a minute without a sign of life; one that is only quiet is left alone."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    await trio.sleep(1000)
    assert len(bench.started) == 2
    hung_at = trio.current_time()
    bench.started[0].answers = False
    await trio.sleep(HANG_SECONDS - 1)
    assert len(bench.started) == 2
    await trio.sleep(2 * LOOK_SECONDS + 1)

    assert [worker.number for worker in bench.started] == [1, 2, 1]
    assert (
        HANG_SECONDS - LOOK_SECONDS < bench.started[2].started_at - hung_at <= HANG_SECONDS + 2 * LOOK_SECONDS
    )
    assert "worker_hangs" in bench.telemetry.errors
    bench.stop.set()


async def test_a_supervisor_that_stood_still_kills_nobody(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Stopped (Ctrl-Z, a frozen container) it heard nobody, which is not the workers' fault."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    await trio.sleep(LOOK_SECONDS * 1.5)
    autojump_clock.jump(10 * HANG_SECONDS)
    await trio.sleep(10 * HANG_SECONDS)

    assert bench.telemetry.errors == []
    assert len(bench.started) == 2
    bench.started[0].answers = False
    await trio.sleep(HANG_SECONDS + 3 * LOOK_SECONDS)
    assert bench.telemetry.errors[0] == "worker_hangs"
    bench.stop.set()


async def test_a_stop_does_not_wait_for_a_backoff(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A worker that waits to be started again is not started any more."""
    bench = Bench()
    nursery.start_soon(bench.run)
    await bench.settle()
    bench.started[0].kill()
    await trio.testing.wait_all_tasks_blocked()
    before = trio.current_time()
    bench.stop.set()
    await bench.settle()

    assert (bench.code, trio.current_time()) == (0, before)
    assert len(bench.started) == 2


async def test_a_question_goes_to_all_others(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Their answers come back together; who knows nothing is not among them."""
    bench = Bench(3)
    nursery.start_soon(bench.run)
    await bench.settle()
    one, two, three = bench.living()
    assert one.say is not None
    assert two.say is not None
    assert three.say is not None
    one.say(Asking(7, "session", "s"))
    await trio.testing.wait_all_tasks_blocked()
    (asked,) = two.heard
    assert asked == Question(1, "session", "s") == three.heard[0]
    two.say(Answer(1, None))
    three.say(Answer(1, b"it is here"))
    await trio.testing.wait_all_tasks_blocked()

    assert one.heard == [Answers(7, {"3": b"it is here"})]
    bench.stop.set()


@pytest.mark.parametrize("how", ["hangs", "dies"])
async def test_one_that_does_not_answer_keeps_nothing_from_the_others(
    nursery: trio.Nursery, autojump_clock: Mock, how: str
) -> None:
    """After a second, or as soon as it is dead; metrics say with the supervisor's page who is up."""
    bench = Bench(3)
    nursery.start_soon(bench.run)
    await bench.settle()
    one, two, three = bench.living()
    assert one.say is not None
    assert two.say is not None
    before = trio.current_time()
    one.say(Asking(7, ASK_METRICS, ""))
    await trio.testing.wait_all_tasks_blocked()
    two.say(Answer(1, b"page of 2"))
    if how == "dies":
        three.kill()
    with trio.fail_after(5):
        await one.told.wait()

    assert one.heard == [Answers(7, {"2": b"page of 2", "supervisor": b"of the supervisor"})]
    assert trio.current_time() - before == pytest.approx(1.0 if how == "hangs" else 0.0, abs=0.001)
    bench.stop.set()


async def test_cancelling_leaves_nothing_behind(autojump_clock: Mock) -> None:
    """As after a second Ctrl-C: the port is free."""
    bench = Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await bench.settle()
        descriptors = [number for worker in bench.started for number in worker.sockets]
        nursery.cancel_scope.cancel()

    for number in descriptors:
        with pytest.raises(OSError, match="Bad file"):
            socket.socket(fileno=number).detach()
