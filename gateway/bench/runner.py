"""Runs steps on subjects in alternation, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import msgspec
from attrs import Factory, define, frozen

from gateway.bench.load import Assignment, Measurement
from gateway.bench.neighbours import neighbours
from gateway.bench.percentiles import median
from gateway.bench.scenarios import WARM_UP, Step
from gateway.bench.socket_client import BenchError
from gateway.bench.subjects import Launch, Running, Subject, child_environment

LOAD_SECONDS = 600.0
"""A load process that takes longer hangs."""


@define
class Outcome:
    """All rounds of one step on one subject."""

    step: Step
    subject: Subject
    rounds: list[Measurement] = Factory(list)

    def median(self) -> Measurement:
        """Each figure's median over the rounds."""
        return median_of(self.rounds)


@frozen
class Runner:
    """Runs steps. ``say`` is told what is being done."""

    say: Callable[[str], None]

    def run(self, steps: Sequence[Step], subjects: Sequence[Subject], rounds: int) -> list[Outcome]:
        """Every step on every subject that can do it, ``rounds`` times. Raises ``BenchError``."""
        return self.run_each([(step, subjects) for step in steps], rounds)

    def run_each(self, work: Sequence[tuple[Step, Sequence[Subject]]], rounds: int) -> list[Outcome]:
        """Every step on those of its subjects that can do it, ``rounds`` times. Raises ``BenchError``."""
        outcomes: list[Outcome] = []
        for step, subjects in work:
            mine = [Outcome(step, subject) for subject in subjects if step.peers_can or not subject.is_peer]
            outcomes += _once_per_process(mine) if step.kind == "idle" else mine
        # Memory first, in processes of its own; then all others beside each other in processes that last.
        for step, _ in work:
            if step.needs_fresh_process:
                self._run_fresh([outcome for outcome in outcomes if outcome.step == step], rounds)
        self._run_lasting([outcome for outcome in outcomes if not outcome.step.needs_fresh_process], rounds)
        return outcomes

    def _run_fresh(self, outcomes: Sequence[Outcome], rounds: int) -> None:
        rounds = min(rounds, outcomes[0].step.most_rounds)
        for number in range(rounds):

            def measure(outcome: Outcome, number: int = number) -> None:
                try:
                    with outcome.subject.launch.start() as running:
                        outcome.rounds.append(self._measure(outcome, running, number, rounds))
                except BenchError as error:
                    # Nothing is compared with this very round: the others are as good without it.
                    if number == rounds - 1 and not outcome.rounds:
                        raise
                    self.say(f"left out, because: {error}")

            with ThreadPoolExecutor(len(outcomes) if outcomes[0].step.only_memory else 1) as pool:
                list(pool.map(measure, outcomes))

    def _run_lasting(self, lasting: Sequence[Outcome], rounds: int) -> None:
        with ExitStack() as stack:
            processes: dict[Launch, Running] = {}
            for outcome in lasting:
                launch = outcome.subject.launch
                if launch not in processes:
                    processes[launch] = stack.enter_context(launch.start())
                    self.load(WARM_UP, outcome.subject, processes[launch])
            for scenario in dict.fromkeys(outcome.step.scenario for outcome in lasting):
                # Steps of a scenario are compared with each other: they alternate too, none is always first.
                mine = [outcome for outcome in lasting if outcome.step.scenario == scenario]
                for number in range(rounds):
                    for outcome in mine if number % 2 == 0 else reversed(mine):
                        running = processes[outcome.subject.launch]
                        outcome.rounds.append(self._measure(outcome, running, number, rounds))

    def _measure(self, outcome: Outcome, running: Running, number: int, rounds: int) -> Measurement:
        self.say(f"{outcome.step.title} · {outcome.subject.name} · {number + 1}/{rounds}")
        try:
            return self._beside_neighbours(outcome.step, outcome.subject, running)
        except BenchError as error:
            # Once more: minutes of other rounds would be lost. What fails twice is no accident.
            self.say(f"once more, because: {error}")
            return self._beside_neighbours(outcome.step, outcome.subject, running)

    def _beside_neighbours(self, step: Step, subject: Subject, running: Running) -> Measurement:
        if step.neighbours is None:
            return self.load(step, subject, running)
        with neighbours(step.neighbours, subject, running) as finish:
            if step.kind == "neighbours":
                time.sleep(step.hold)
                measurement = Measurement(sessions=0, wall_s=step.hold)
            else:
                measurement = self.load(step, subject, running)
            beside = finish()
        return msgspec.structs.replace(
            measurement,
            # The process worked for the neighbours too.
            cpu_us_per_token=None,
            neighbour_tokens_per_s=beside.tokens_per_s if step.neighbours.readers else None,
            closed_after_s=max(beside.closed_after_s, default=None),
            still_open=beside.still_open if step.neighbours.stalled else None,
            given_up_after_s=beside.given_up_after_s,
            kb_per_stalled=beside.kb_per_stalled,
        )

    def load(self, step: Step, subject: Subject, running: Running) -> Measurement:
        """One load, measured, without its neighbours. Raises ``BenchError``."""
        assert step.kind != "neighbours"
        assignment = Assignment(
            kind=step.kind,
            host=running.host,
            port=running.port,
            pid=running.pid,
            path=subject.path,
            dialect=subject.dialect,
            headers=subject.headers,
            sessions=step.sessions,
            tokens=step.tokens,
            pace=step.pace,
            hold=step.hold,
            steady=step.steady,
        )
        try:
            done = subprocess.run(
                [sys.executable, "-m", "gateway.bench.load"],
                input=msgspec.json.encode(assignment),
                capture_output=True,
                env=child_environment({}),
                timeout=LOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"{step.title} on {subject.name}: not over in {LOAD_SECONDS:g} s") from None
        if done.returncode:
            reason = done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
            raise BenchError(f"{step.title} on {subject.name}: {reason}")
        return msgspec.json.decode(done.stdout, type=Measurement)


def median_of(rounds: Sequence[Measurement]) -> Measurement:
    """Each figure's median over the rounds; None where none has it."""
    fields = [msgspec.structs.asdict(one) for one in rounds]
    return Measurement(**{name: _median([one[name] for one in fields]) for name in fields[0]})


def _median(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        return {name: median([one[name] for one in known]) for name in known[0]}
    middle = median(known)
    return round(middle) if isinstance(known[0], int) else middle


def _once_per_process(outcomes: list[Outcome]) -> list[Outcome]:
    """An idle socket is the same in every dialect: one of each process is enough."""
    seen: dict[Launch, Outcome] = {}
    for outcome in outcomes:
        seen.setdefault(outcome.subject.launch, outcome)
    return list(seen.values())
