"""The table of ``docs/performance.md``: every row that has a bar, beside the peers of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import evolve, frozen

from gateway.bench.load import Measurement
from gateway.bench.report import number
from gateway.bench.runner import Outcome, Runner
from gateway.bench.scenarios import BURST, IDLE, PACED, RESUME, Step, ramp_step
from gateway.bench.soak_report import SoakRead
from gateway.bench.subjects import Launch, Subject
from gateway.bench.trends import FLAT_SHARE

FEW_IDLE = evolve(IDLE, hold=0.1, only_memory=True)
"""Memory is there at once."""
MANY_IDLE = evolve(IDLE, sessions=10_000, hold=20.0, peers_can=False, most_rounds=3)
"""20 s, so that every socket has its heartbeat once."""
RAMP = (ramp_step(10), ramp_step(1_000))

MEMORY_V1, MEMORY_V2 = "memory v1", "memory v2"
SQLITE_V1, SQLITE_V2 = "SQLite v1", "SQLite v2"
_OURS = (MEMORY_V1, MEMORY_V2, SQLITE_V1, SQLITE_V2)
_SLACK_ON_SQLITE = 1.25
_RESUME_MS, _SOCKET_KB, _MANY_MB, _MANY_CPU, _GROWTH, _MEDIAN_MS = 50.0, 24.0, 300.0, 10.0, 0.15, 1.0

_SOAKED = {"gateway memory://": MEMORY_V1, "gateway sqlite": SQLITE_V1}

Cells = dict[str, float]
"""A figure by the subject's name."""


@frozen
class Row:
    """One line of the table."""

    what: str
    target: str
    cells: dict[str, str]
    missed_by: tuple[str, ...]
    """Subjects that are over the bar; empty when the row is met."""
    is_judged: bool = True
    """Whether there was a bar for anything that was measured."""

    @property
    def met(self) -> str:
        """The last cell."""
        if not self.target:
            return ""
        if not self.is_judged:
            return "not measured"
        return "no: " + ", ".join(self.missed_by) if self.missed_by else "yes"


def run_targets(
    runner: Runner, *, memory: Launch, sqlite: Launch, peers: Sequence[Subject], rounds: int
) -> list[Outcome]:
    """Measure everything that the table needs. Raises ``BenchError``."""
    by_name = {
        MEMORY_V1: Subject(MEMORY_V1, memory),
        SQLITE_V1: Subject(SQLITE_V1, sqlite),
        MEMORY_V2: Subject(MEMORY_V2, memory, dialect="v2-json", path="/api/v1/ws/bench-v2-%d"),
        SQLITE_V2: Subject(SQLITE_V2, sqlite, dialect="v2-json", path="/api/v1/ws/bench-v2-%d"),
    }
    ours = list(by_name.values())
    memory_v1 = [by_name[MEMORY_V1]]
    return runner.run_each(
        [
            (PACED, [*ours, *peers]),
            (BURST, [*ours, *peers]),
            (FEW_IDLE, [*memory_v1, by_name[SQLITE_V1], *peers]),
            (MANY_IDLE, memory_v1),
            (RESUME, ours),
            *((step, memory_v1) for step in RAMP),
        ],
        rounds,
    )


def rows_of(outcomes: Sequence[Outcome], soaked: SoakRead | None = None) -> list[Row]:
    """The table's rows, judged; the first peer is the one that bars refer to, if there is one."""
    peer = next((outcome.subject.name for outcome in outcomes if outcome.subject.is_peer), None)

    def cells(step: Step, figure: Callable[[Measurement], float | None]) -> Cells:
        found = {
            outcome.subject.name: figure(outcome.median()) for outcome in outcomes if outcome.step == step
        }
        return {name: value for name, value in found.items() if value is not None}

    def cpu(measured: Measurement) -> float | None:
        return measured.cpu_us_per_token

    rows = []
    for step, slack in ((PACED, _SLACK_ON_SQLITE), (BURST, 1.0)):
        values = cells(step, cpu)
        bars = {
            name: values[peer] * (slack if name in (SQLITE_V1, SQLITE_V2) else 1.0)
            for name in _OURS
            if peer in values
        }
        on_sqlite = f" (SQLite {slack:g} times that)" if slack > 1 else ""
        load = f"{step.sessions} sessions, " + (
            f"a token each {step.pace * 1000:g} ms" if step.pace else "burst"
        )
        rows.append(_row(f"CPU per token, {load}, µs", f"≤ {peer or 'the peer'}{on_sqlite}", values, bars))
    for name, bound in (("p50", _MEDIAN_MS), ("p99", None)):
        values = cells(PACED, lambda measured, name=name: (measured.token_ms or {}).get(name))  # type: ignore[misc]
        most = min(bound or 1e9, values.get(peer or "", 1e9))
        target = f"≤ {peer or 'the peer'}" + (f", < {bound:g} ms" if bound else "")
        rows.append(_row(f"latency added, same run, {name}, ms", target, values, dict.fromkeys(_OURS, most)))
    values = cells(FEW_IDLE, lambda measured: measured.kb_per_socket)
    rows.append(
        _row("memory per idle socket, KB", f"≤ {_SOCKET_KB:g}", values, dict.fromkeys(_OURS, _SOCKET_KB))
    )
    values = cells(MANY_IDLE, lambda measured: measured.resident_mb)
    rows.append(_row("10 000 idle sockets, MB", f"< {_MANY_MB:g}", values, dict.fromkeys(_OURS, _MANY_MB)))
    values = cells(MANY_IDLE, lambda measured: measured.cpu_percent)
    rows.append(
        _row("10 000 idle sockets, % of a core", f"< {_MANY_CPU:g}", values, dict.fromkeys(_OURS, _MANY_CPU))
    )
    values = cells(RESUME, lambda measured: (measured.resume_ms or {}).get("p99"))
    rows.append(
        _row(
            "resume, 1 000 events missed, p99, ms",
            f"≤ {_RESUME_MS:g}",
            values,
            dict.fromkeys(_OURS, _RESUME_MS),
        )
    )
    first = cells(RAMP[0], cpu)
    for step in RAMP:
        values = cells(step, cpu)
        bars = {name: first[name] * (1 + _GROWTH) for name in _OURS if name in first}
        target = "" if step is RAMP[0] else f"± {_GROWTH:.0%} of 10 sessions'"
        rows.append(
            _row(f"CPU per token, {step.sessions:,} sessions at 5 000 tokens/s, µs", target, values, bars)
        )
    rows.append(_soak_row(soaked))
    return rows


def _soak_row(soaked: SoakRead | None) -> Row:
    slopes: Cells = {}
    bars: Cells = {}
    for outcome in soaked.outcomes if soaked else ():
        name, trend = _SOAKED.get(outcome.subject), outcome.trends.get("resident_mb")
        if name is not None and trend is not None:
            slopes[name], bars[name] = trend.slope_per_hour, FLAT_SHARE * trend.mean
    minutes = "an hour" if soaked is None else f"{soaked.minutes:g} minutes"
    return _row(
        f"memory over {minutes} of turns, MB more per hour", f"flat: ≤ {FLAT_SHARE:.0%}", slopes, bars
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table, to be pasted."""
    names = [name for name in _OURS if any(name in row.cells for row in rows)]
    names += list(dict.fromkeys(name for row in rows for name in row.cells if name not in _OURS))
    lines = [
        f"| what | target | {' | '.join(names)} | met |",
        f"| --- | --- |{' ---: |' * len(names)} --- |",
    ]
    for row in rows:
        cells = " | ".join(row.cells.get(name, "") for name in names)
        lines.append(f"| {row.what} | {row.target} | {cells} | {row.met} |")
    return "\n".join(lines) + "\n"


def _row(what: str, target: str, values: Cells, bars: Cells) -> Row:
    missed = tuple(name for name, bar in bars.items() if name in values and values[name] > bar)
    digits = 2 if what.endswith("ms") else 1
    cells = {name: f"{value:.{digits}f}" if digits == 2 else number(value) for name, value in values.items()}
    return Row(what, target, cells, missed, is_judged=bool(bars.keys() & values.keys()))
