"""Keeps the workers of ``gateway serve --workers`` running, and stops them together.

    supervisor nursery
    ├── seat, one per worker      start → wait for its end → start again
    │   ├── channel               what it says and asks
    │   └── hang watch            asks for a sign of life, and kills who gives none
    ├── question, one each        put to all other workers, answered within a second
    └── stop watcher              close the port, SIGTERM to all, SIGKILL to who does not end

It serves nobody itself and holds no session: all that it has to lose is the port.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import trio
from attrs import define, field

from gateway.config import Configuration
from gateway.node_ports import ASK_METRICS
from gateway.ports import Telemetry
from gateway.workers.channel import Answer, Answers, Asking, Leaving, Listening, Message, Question
from gateway.workers.ports import SharedPorts
from gateway.workers.worker_process import Place, StartWorker, Worker, WorkerProcess, dump_configuration

STABLE_SECONDS: Final = 10.0
"""A worker that served for so long was well: it is started again at once."""
MOST_FAILURES: Final = 6
"""Starts of one worker in a row that came to nothing, after which the supervisor gives up …"""
_BACKOFF_FIRST: Final = 0.5
"""… and the seconds between them, twice as many each time: 15.5 in all."""
ANSWER_SECONDS: Final = 1.0
"""What the others have for an answer; one that hangs must not keep metrics from all."""
LOOK_SECONDS: Final = 5.0
"""Between two questions whether a worker is there: one that hangs still gets connections from the kernel."""
HANG_SECONDS: Final = 30.0
"""Without any answer from a worker, after which it is killed: far above what a busy machine takes."""
_KILL_AFTER: Final = 5.0
"""Seconds beyond what a drain may take."""
_FAILED: Final = 1
_NOBODYS: Final = 0
"""The number of a question whose answer only shows that somebody is there."""


@define(eq=False)
class _Seat:
    number: int
    worker: Worker | None = None
    listens: bool = False
    listened_at: float | None = None
    heard_at: float = 0.0
    failures: int = 0


@define(eq=False)
class _Poll:
    """A question that is with the others."""

    waiting: set[int]
    contents: dict[str, bytes] = field(factory=dict)
    done: trio.Event = field(factory=trio.Event)


class Supervisor:
    """``render_metrics`` gives the supervisor's own page, which goes with those of the workers."""

    def __init__(
        self,
        configuration: Configuration,
        telemetry: Telemetry,
        *,
        render_metrics: Callable[[], bytes],
        announce: Callable[[Sequence[str]], None],
        randomness: random.Random,
        start_worker: StartWorker = WorkerProcess.start,
    ) -> None:
        self._configuration = configuration
        self._telemetry = telemetry
        self._render_metrics = render_metrics
        self._announce = announce
        self._random = randomness
        self._start_worker = start_worker
        self._dumped = dump_configuration(configuration)
        self._count = configuration.settings.workers
        self._seats = [_Seat(number) for number in range(1, self._count + 1)]
        self._polls: dict[int, _Poll] = {}
        self._numbers = itertools.count(1)
        self._first_listens = trio.Event()
        self._announced = False
        self._stop = trio.Event()
        self._exit_code = 0

    async def run(self, stop: trio.Event) -> int:
        """Run the workers until ``stop``, drain them, and return the exit code.

        Raises ``OSError`` when an address cannot be bound. Not 0 when a worker could not be kept running or
        had to be killed. Cancelling kills all workers at once.
        """
        settings = self._configuration.settings
        self._ports = SharedPorts(self._configuration.binds)
        try:
            self._metrics_ports = SharedPorts(settings.metrics_bind)
            try:
                await self._run(stop)
            finally:
                self._metrics_ports.close()
        finally:
            self._ports.close()
        self._telemetry.info("workers_stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _run(self, stop: trio.Event) -> None:
        async with trio.open_nursery() as self._questions, trio.open_nursery() as watchers:

            async def pass_on() -> None:
                await stop.wait()
                self._stop.set()
                self._first_listens.set()

            watchers.start_soon(pass_on)
            watchers.start_soon(self._stop_all)
            async with trio.open_nursery() as seats:
                first, *others = self._seats
                seats.start_soon(self._keep_running, first)
                # What prevents a start is told once, and not by every worker.
                await self._first_listens.wait()
                for seat in others:
                    seats.start_soon(self._keep_running, seat)
            watchers.cancel_scope.cancel()
            self._questions.cancel_scope.cancel()

    async def _stop_all(self) -> None:
        await self._stop.wait()
        # Before the workers stop listening: what still came would wait in a queue that nobody reads.
        self._ports.close()
        drain_timeout = self._configuration.settings.drain_timeout
        self._telemetry.info("workers_stopping", drain_timeout=drain_timeout)
        for seat in self._seats:
            if seat.worker is not None:
                seat.worker.ask_to_stop()
        # For its sockets, then for its REST calls, each worker has that long.
        await trio.sleep(2 * drain_timeout + _KILL_AFTER)
        for seat in self._seats:
            if seat.worker is not None:
                self._telemetry.error("worker_killed", worker=seat.number, pid=seat.worker.pid)
                self._exit_code = self._exit_code or _FAILED
                seat.worker.kill()

    # ------------------------------------------------------------------ one worker

    async def _keep_running(self, seat: _Seat) -> None:
        while not self._stop.is_set():
            try:
                code = await self._run_once(seat)
            except OSError as error:  # no memory or no descriptors for a process, which may pass
                self._telemetry.error("worker_not_started", worker=seat.number, cause=error)
                code = _FAILED
            if self._stop.is_set():
                return
            now = trio.current_time()
            served = 0.0 if seat.listened_at is None else now - seat.listened_at
            # With 0 somebody had asked it to stop.
            tell = self._telemetry.error if code else self._telemetry.warning
            tell("worker_ended", worker=seat.number, exit_code=code, served_s=round(served, 3))
            seat.failures = 0 if served >= STABLE_SECONDS else seat.failures + 1
            if seat.failures >= MOST_FAILURES or not self._announced:
                # At the first start what is wrong is for whoever started it to see, as with one process.
                self._give_up(seat, code)
                return
            if seat.failures:
                # What would come to it goes to the others meanwhile.
                self._ports.give_up(seat.number)
                self._metrics_ports.give_up(seat.number)
                with trio.move_on_after(self._backoff(seat.failures)):
                    await self._stop.wait()
            self._telemetry.count("gateway_worker_restarts_total", worker=str(seat.number))

    async def _run_once(self, seat: _Seat) -> int:
        seat.listened_at = None
        worker = await self._start_worker(
            Place(
                number=seat.number,
                count=self._count,
                configuration=self._dumped,
                sockets=self._ports.of_worker(seat.number),
                metrics_sockets=self._metrics_ports.of_worker(seat.number),
            )
        )
        seat.worker = worker
        self._telemetry.info("worker_started", worker=seat.number, pid=worker.pid)
        if self._stop.is_set():
            worker.ask_to_stop()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_for_hang, seat, worker)
                code = await worker.run(partial(self._take, seat))
                nursery.cancel_scope.cancel()
            return code
        finally:
            seat.worker, seat.listens = None, False
            for poll in tuple(self._polls.values()):
                self._answered(poll, seat, None)

    async def _watch_for_hang(self, seat: _Seat, worker: Worker) -> None:
        while True:
            due = trio.current_time() + LOOK_SECONDS
            await trio.sleep_until(due)
            now = trio.current_time()
            # Nothing is heard while this process is stopped (Ctrl-Z, a frozen container), whoever speaks.
            seat.heard_at = min(now, seat.heard_at + now - due)
            if not seat.listens:
                continue
            silent = now - seat.heard_at
            if silent > HANG_SECONDS:
                self._telemetry.error(
                    "worker_hangs", worker=seat.number, pid=worker.pid, silent_s=round(silent, 1)
                )
                worker.kill()
                return
            worker.post(Question(_NOBODYS, "alive", ""))

    def _give_up(self, seat: _Seat, code: int) -> None:
        self._telemetry.error("worker_given_up", worker=seat.number, exit_code=code)
        self._exit_code = code if code > 0 else _FAILED
        self._stop.set()
        self._first_listens.set()

    def _backoff(self, failures: int) -> float:
        return _BACKOFF_FIRST * 2.0 ** (failures - 1) * self._random.uniform(0.8, 1.0)

    # ------------------------------------------------------------------ what it says

    def _take(self, seat: _Seat, message: Message) -> None:
        seat.heard_at = trio.current_time()
        if isinstance(message, Listening):
            seat.listens, seat.listened_at = True, seat.heard_at
            self._first_listens.set()
            if not self._announced and all(each.listens for each in self._seats):
                self._announced = True
                self._announce(message.urls)
        elif isinstance(message, Leaving):
            seat.listens = False
            self._ports.give_up(seat.number)
        elif isinstance(message, Asking):
            self._questions.start_soon(self._ask_others, seat, message)
        elif isinstance(message, Answer) and (poll := self._polls.get(message.number)) is not None:
            self._answered(poll, seat, message.content)

    async def _ask_others(self, asker: _Seat, asking: Asking) -> None:
        number = next(self._numbers)
        others = [seat for seat in self._seats if seat is not asker and seat.listens]
        self._polls[number] = poll = _Poll({seat.number for seat in others})
        for seat in others:
            if seat.worker is not None:
                seat.worker.post(Question(number, asking.question, asking.about))
        with trio.move_on_after(ANSWER_SECONDS):
            if poll.waiting:
                await poll.done.wait()
        del self._polls[number]
        if asking.question == ASK_METRICS:
            poll.contents["supervisor"] = self._own_page({asker.number, *map(int, poll.contents)})
        if asker.worker is not None:
            asker.worker.post(Answers(asking.number, poll.contents))

    @staticmethod
    def _answered(poll: _Poll, seat: _Seat, content: bytes | None) -> None:
        if seat.number not in poll.waiting:
            return
        poll.waiting.discard(seat.number)
        if content is not None:
            poll.contents[str(seat.number)] = content
        if not poll.waiting:
            poll.done.set()

    def _own_page(self, answered: set[int]) -> bytes:
        for seat in self._seats:
            self._telemetry.set_gauge("gateway_worker_up", seat.number in answered, worker=str(seat.number))
        return self._render_metrics()
