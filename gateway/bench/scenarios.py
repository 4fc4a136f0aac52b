"""What is measured: each scenario is a few steps, each step one assignment for the load process."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

RAMP_SESSIONS = (10, 30, 100, 300, 1000)
RAMP_TOKENS_PER_SECOND = 5_000
"""Of all sessions together, at every step: so that nothing but the number of sessions grows."""
RAMP_SECONDS = 6


@frozen(kw_only=True)
class Step:
    """One load. Times in seconds."""

    scenario: str
    kind: Literal["stream", "idle", "resume"]
    sessions: int
    tokens: int = 0
    """Per session; resume: how many events are missed."""
    pace: float = 0.0
    hold: float = 0.0
    steady: bool = False
    """Whether CPU is measured between the beginnings and the ends of the answers."""
    peers_can: bool = True
    """Whether a relay that knows no sessions can be asked for it."""

    @property
    def needs_fresh_process(self) -> bool:
        """Memory per socket means nothing in a process that has served others before."""
        return self.kind == "idle"

    @property
    def title(self) -> str:
        """What it is, in a line."""
        if self.kind == "idle":
            return f"{self.scenario}: {self.sessions:,} idle sockets, CPU over {self.hold:g} s"
        if self.kind == "resume":
            return f"{self.scenario}: {self.sessions} sessions, {self.tokens:,} events missed"
        rate = f"a token each {self.pace * 1000:g} ms" if self.pace else f"{self.tokens:,} tokens unpaced"
        return f"{self.scenario}: {self.sessions:,} sessions, {rate}"


PACED = Step(scenario="paced", kind="stream", sessions=100, tokens=250, pace=0.02)
BURST = Step(scenario="burst", kind="stream", sessions=20, tokens=5_000)
IDLE = Step(scenario="idle", kind="idle", sessions=1_000, hold=5.0)
RESUME = Step(scenario="resume", kind="resume", sessions=100, tokens=1_000, peers_can=False)
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
}
