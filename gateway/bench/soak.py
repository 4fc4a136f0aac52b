"""Whether a gateway grows: an hour of turns in sessions that come and go, and its memory meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec
from attrs import Factory, define, frozen

from gateway.bench.soak_load import Sample, SoakAssignment
from gateway.bench.socket_client import DIALECTS, BenchError
from gateway.bench.subjects import Running, Subject, child_environment
from gateway.bench.trends import Trend, trend_of

SAMPLE_SECONDS = 10.0
_WARM_UP_SHARE = 0.25
_WINDOW_SHARE = 1 / 6
_LEAST_WINDOW = 10.0
"""However short the soak is: its clients are away for some seconds, and must find their sessions."""
_RETENTION = 600.0
"""The default of ``REPLAY_RETENTION``."""
_DETACH_GRACE = 120.0
_STOPPING_SECONDS = 300.0
"""How long turns may take that run at the end of the time."""
JUDGED = ("resident_mb", "rest_mb", "descriptors")
"""Figures that must not grow. The others say why these move: what is held, and for how many sessions, is the
load's doing, which is as even as the machine is idle; a journal on disk comes and goes."""
_FIGURES: Mapping[str, tuple[str, Callable[[Sample], float | None]]] = {
    "resident_mb": ("resident MB", lambda sample: sample.resident_mb),
    "rest_mb": (
        "… less what is held MB",
        lambda sample: None if sample.held_mb is None else sample.resident_mb - sample.held_mb,
    ),
    "held_mb": ("held for replay MB", lambda sample: sample.held_mb),
    "sessions_live": ("sessions in memory", lambda sample: sample.sessions_live),
    "descriptors": ("descriptors", lambda sample: float(sample.descriptors)),
    "store_mb": ("store file MB", lambda sample: sample.store_mb),
}


@frozen
class Soak:
    """How long, and how much."""

    minutes: float = 60.0
    sessions: int = 20
    """At the same time; each lasts some turns and makes room for the next."""
    pace: float = 0.05
    """Seconds from token to token."""

    @property
    def warm_up(self) -> float:
        """Seconds until what is kept for a time is as much as it will be: samples from then on count."""
        return self.minutes * 60 * _WARM_UP_SHARE

    @property
    def settings(self) -> dict[str, str]:
        """Of the gateways that are started for it.

        What is kept for a time has to be let go within the warm-up. In a soak of 60 minutes events are kept
        for 10 minutes as by default, and as long ids of messages, which a durable store remembers for a day.
        """
        window = max(_LEAST_WINDOW, min(_RETENTION, self.minutes * 60 * _WINDOW_SHARE))
        return {
            "REPLAY_RETENTION": f"{window:g}",
            "DEDUPE_WINDOW": f"{window:g}",
            "DETACH_GRACE": f"{min(_DETACH_GRACE, window):g}",
        }


@define
class SoakOutcome:
    """One subject's samples."""

    subject: Subject
    warm_up: float
    samples: list[Sample] = Factory(list)

    def trends(self) -> dict[str, tuple[str, Trend]]:
        """What was sampled: a title and its trend after the warm-up, by the name of the sample's field."""
        found: dict[str, tuple[str, Trend]] = {}
        for name, (title, get) in _FIGURES.items():
            points = [
                (sample.at_s, value)
                for sample in self.samples
                if sample.at_s >= self.warm_up and (value := get(sample)) is not None
            ]
            trend = trend_of(points)
            if trend is not None:
                found[name] = (title, trend)
        return found


def run_soak(soak: Soak, subjects: Sequence[Subject], say: Callable[[str], None]) -> list[SoakOutcome]:
    """Soak all subjects beside each other. Interrupted, what was sampled until then is the outcome.

    Raises ``BenchError``.
    """
    outcomes = [SoakOutcome(subject, soak.warm_up) for subject in subjects]
    with ExitStack() as stack:
        loads: list[subprocess.Popen[bytes]] = []
        for number, outcome in enumerate(outcomes):
            running = stack.enter_context(outcome.subject.launch.start())
            load = _start(_assignment(soak, outcome.subject, running, number))
            stack.callback(_end, load)
            loads.append(load)
        with ThreadPoolExecutor(len(loads)) as readers:
            reading = [
                readers.submit(_read, load, outcome, soak, say)
                for load, outcome in zip(loads, outcomes, strict=True)
            ]
            try:
                for one in reading:
                    one.result()
            except KeyboardInterrupt:
                say("interrupted: this is what there was until now")
            finally:
                for load in loads:
                    load.terminate()
    return outcomes


def _assignment(soak: Soak, subject: Subject, running: Running, number: int) -> SoakAssignment:
    return SoakAssignment(
        host=running.host,
        port=running.port,
        pid=running.pid,
        path=subject.path,
        dialects=tuple(DIALECTS),
        headers=subject.headers,
        store_file=str(running.store_file or ""),
        sessions=soak.sessions,
        pace=soak.pace,
        seconds=soak.minutes * 60,
        every=min(SAMPLE_SECONDS, soak.minutes * 60 / 20),
        name=f"soak-{time.time_ns()}",
        seed=number,
    )


def _start(assignment: SoakAssignment) -> subprocess.Popen[bytes]:
    load = subprocess.Popen(
        [sys.executable, "-m", "gateway.bench.soak_load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment({}),
    )
    assert load.stdin is not None
    load.stdin.write(msgspec.json.encode(assignment))
    load.stdin.close()
    return load


def _read(
    load: subprocess.Popen[bytes], outcome: SoakOutcome, soak: Soak, say: Callable[[str], None]
) -> None:
    assert load.stdout is not None
    for line in load.stdout:
        sample = msgspec.json.decode(line, type=Sample)
        outcome.samples.append(sample)
        say(
            f"{sample.at_s / 60:.1f} of {soak.minutes:g} min · {outcome.subject.name} · "
            f"{sample.resident_mb:.1f} MB · {sample.turns:,} turns · {sample.failures} failures"
        )
    if load.wait(_STOPPING_SECONDS) > 0:
        raise BenchError(f"the load of {outcome.subject.name} failed; what it said is above")


def _end(load: subprocess.Popen[bytes]) -> None:
    load.terminate()
    load.wait()
    if load.stdout is not None:
        load.stdout.close()
