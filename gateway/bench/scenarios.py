"""What is measured: each scenario is a few steps, each step one assignment for the load process."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from gateway.bench.emitter import Plan

RAMP_SESSIONS = (10, 30, 100, 300, 1000)
RAMP_TOKENS_PER_SECOND = 5_000
"""Of all sessions together, at every step: so that nothing but the number of sessions grows."""
RAMP_SECONDS = 5


@frozen(kw_only=True)
class Neighbours:
    """Clients beside those that are measured, each in a session of its own; who was answered asks again."""

    readers: int = 0
    stalled: int = 0
    """That ask as well, and then never read."""
    plan: Plan

    @property
    def title(self) -> str:
        """What they are, in a line."""
        count = self.readers + self.stalled
        rate = f"at {self.plan.size / self.plan.pace / 1000:.0f} KB/s" if self.plan.pace else "unpaced"
        silent = f", {self.stalled or 'none'} of which never read" if self.plan.pace else ""
        return f"{count} {'session' if count == 1 else 'sessions'} {rate}{silent}"


@frozen(kw_only=True)
class Step:
    """One load. Times in seconds."""

    scenario: str
    kind: Literal["stream", "idle", "resume", "neighbours"]
    """``neighbours``: nobody but them, for ``hold``."""
    sessions: int
    tokens: int = 0
    """Per session; resume: how many events are missed."""
    pace: float = 0.0
    hold: float = 0.0
    steady: bool = False
    """Whether CPU is measured between the beginnings and the ends of the answers."""
    neighbours: Neighbours | None = None
    only_memory: bool = False
    """Idle: nothing but memory is asked for, so that others may be measured at the same time."""
    most_rounds: int = 1000
    """In fresh processes: more are not run, for figures that hardly differ from round to round."""
    peers_can: bool = True
    """Whether a relay that knows no sessions can be asked for it."""

    @property
    def needs_fresh_process(self) -> bool:
        """Memory per socket means nothing in a process that has served others before."""
        return self.kind in ("idle", "neighbours")

    @property
    def title(self) -> str:
        """What it is, in a line."""
        if self.kind == "idle":
            return f"{self.scenario}: {self.sessions:,} idle sockets, CPU over {self.hold:g} s"
        if self.kind == "resume":
            return f"{self.scenario}: {self.sessions} sessions, {self.tokens:,} events missed"
        beside = self.neighbours.title if self.neighbours else ""
        if self.kind == "neighbours":
            return f"{self.scenario}: nobody but {beside}"
        rate = f"a token each {self.pace * 1000:g} ms" if self.pace else f"{self.tokens:,} tokens unpaced"
        return f"{self.scenario}: {self.sessions:,} sessions, {rate}" + (
            f", beside {beside}" if beside else ""
        )


PACED = Step(scenario="paced", kind="stream", sessions=100, tokens=250, pace=0.02)
BURST = Step(scenario="burst", kind="stream", sessions=20, tokens=5_000)
IDLE = Step(scenario="idle", kind="idle", sessions=1_000, hold=5.0)
RESUME = Step(scenario="resume", kind="resume", sessions=100, tokens=1_000, peers_can=False)
_BUSY = Plan(2_000, 0.02, 0.0, 4 << 10)
"""Kernel buffers are full within seconds, so that it shows who does not read."""
STALLED = tuple(
    Step(
        scenario="stalled",
        kind="stream",
        sessions=100,
        tokens=800,
        pace=0.02,
        peers_can=False,
        neighbours=Neighbours(readers=10 - stalled, stalled=stalled, plan=_BUSY),
    )
    for stalled in (0, 1, 10)
)
"""Long enough that whoever stalls from the beginning on is closed before the end."""
STALLED_ALONE = Step(
    scenario="stalled",
    kind="neighbours",
    sessions=0,
    hold=20.0,
    peers_can=False,
    neighbours=Neighbours(stalled=10, plan=_BUSY),
)
FAIRNESS = tuple(
    Step(scenario="fairness", kind="stream", sessions=50, tokens=500, pace=0.02, neighbours=neighbours)
    for neighbours in (None, Neighbours(readers=1, plan=Plan(20_000)))
)
WARM_UP = Step(scenario="warm-up", kind="stream", sessions=20, tokens=100, pace=0.002)


def ramp_step(sessions: int) -> Step:
    """The step of the ramp with so many sessions."""
    pace = sessions / RAMP_TOKENS_PER_SECOND
    return Step(
        scenario="ramp",
        kind="stream",
        sessions=sessions,
        tokens=round(RAMP_SECONDS / pace),
        pace=pace,
        steady=True,
    )


SCENARIOS: dict[str, tuple[Step, ...]] = {
    "paced": (PACED,),
    "burst": (BURST,),
    "idle": (IDLE,),
    "resume": (RESUME,),
    "ramp": tuple(ramp_step(sessions) for sessions in RAMP_SESSIONS),
    "fairness": FAIRNESS,
    "stalled": (*STALLED, STALLED_ALONE),
}
BY_DEFAULT = ("paced", "burst", "idle", "resume", "ramp")
"""What is measured when nothing is asked for by name."""
