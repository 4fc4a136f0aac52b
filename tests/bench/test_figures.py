"""From measurements to tables, judgements and pictures."""

from __future__ import annotations

import os
import time
import xml.etree.ElementTree as ET

import msgspec
import pytest

from gateway.bench.emitter import Plan, parse_plan, token_chunk
from gateway.bench.load import Measurement, message
from gateway.bench.percentiles import median, median_p99_ms, percentiles_ms
from gateway.bench.plot import panels_of, svg
from gateway.bench.process_figures import CannotMeasure, cpu_seconds, resident_kilobytes
from gateway.bench.report import as_json, table
from gateway.bench.runner import Outcome, Runner, median_of
from gateway.bench.scenarios import (
    BURST,
    FAIRNESS,
    IDLE,
    PACED,
    RAMP_SECONDS,
    RESUME,
    SCENARIOS,
    STALLED,
    STALLED_ALONE,
    Step,
    ramp_step,
)
from gateway.bench.soak_report import SoakRead, SubjectRead, TrendRead
from gateway.bench.socket_client import BenchError
from gateway.bench.subjects import Launch, Running, Subject, running_launch
from gateway.bench.targets import FEW_IDLE, MANY_IDLE, MEMORY_V1, RAMP, SQLITE_V1, markdown, rows_of

LAUNCH = running_launch("x", "http://127.0.0.1:1", 1)


def outcome(step: Step, name: str, *, is_peer: bool = False, **figures: object) -> Outcome:
    """One round of ``step`` on ``name``."""
    rounds = [Measurement(sessions=step.sessions, wall_s=1.0, **figures)]  # type: ignore[arg-type]
    return Outcome(step, Subject(name, LAUNCH, is_peer=is_peer), rounds)


def latency(p50: float, p99: float) -> dict[str, float]:
    """Percentiles."""
    return {"p50": p50, "p99": p99, "p99.9": p99}


def test_percentiles_are_values_that_were_measured() -> None:
    """In milliseconds; of nothing there are none."""
    assert percentiles_ms([]) is None
    assert percentiles_ms([5_000_000]) == {"p50": 5.0, "p99": 5.0, "p99.9": 5.0}
    thousand = [number * 1_000_000 for number in range(1000)]
    assert percentiles_ms(thousand[::-1]) == {"p50": 500.0, "p99": 990.0, "p99.9": 999.0}


def test_the_median_is_not_moved_by_one_bad_round() -> None:
    """Figure by figure, also inside percentiles; what no round has stays empty."""
    rounds = [
        Measurement(sessions=1, wall_s=wall, tokens=7, cpu_us_per_token=cpu, token_ms=latency(cpu, wall))
        for wall, cpu in ((1.0, 30.0), (9.0, 31.0), (2.0, 500.0))
    ]
    found = median_of(rounds)
    assert (found.wall_s, found.tokens, found.cpu_us_per_token) == (2.0, 7, 31.0)
    assert found.token_ms == {"p50": 31.0, "p99": 2.0, "p99.9": 2.0}
    assert found.resume_ms is None
    assert median([1, 2]) == 1.5
    with pytest.raises(ValueError, match="of nothing"):
        median([])


def test_a_plan_survives_any_envelope() -> None:
    """The gateway and peers pass the content on; a message of somebody's own gets a few tokens too."""
    plan = Plan(250, 0.02, 0.5, 4096)
    for dialect in ("v1", "v2-json"):
        assert parse_plan(b'{"session_id":"s","message":' + message(dialect, plan, "id") + b"}") == plan
    assert parse_plan(b"{}") == Plan(3)


def test_tokens_are_events_of_the_runtime() -> None:
    """A chunk that holds one event with the time in it; the last one is final."""
    size, _, rest = token_chunk(4, 5, 123).partition(b"\r\n")
    assert len(rest) - 2 == int(size, 16)
    fields = msgspec.json.decode(rest.partition(b"data: ")[2].strip())
    assert fields == {
        "type": "assistant_message",
        "content": None,
        "token": "tok4 ",
        "is_final": True,
        "t": 123,
    }


def test_the_ramp_changes_nothing_but_the_number_of_sessions() -> None:
    """The same tokens a second at every step, for as long."""
    for step in SCENARIOS["ramp"]:
        assert step.sessions / step.pace == pytest.approx(5_000)
        assert step.tokens * step.pace == pytest.approx(RAMP_SECONDS, rel=0.02)


def test_cpu_time_and_memory_of_a_process_are_read_from_outside() -> None:
    """All of its threads; a process that is not there is a message, not a traceback."""
    before = cpu_seconds(os.getpid())
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    assert 0.02 <= cpu_seconds(os.getpid()) - before < 5
    assert resident_kilobytes(os.getpid()) > 1000
    for figure in (cpu_seconds, resident_kilobytes):
        with pytest.raises(CannotMeasure):
            figure(2**22 - 1)


def test_the_table_shows_what_was_measured_and_the_ratio_to_the_peer() -> None:
    """Columns that nobody filled are left out."""
    shown = table(
        [
            outcome(PACED, "ours", tokens=10, cpu_us_per_token=30.0, token_ms=latency(0.5, 4)),
            outcome(PACED, "Node", is_peer=True, tokens=10, cpu_us_per_token=40.0, token_ms=latency(1, 5)),
            outcome(IDLE, "ours", kb_per_socket=23.5),
        ]
    )
    assert "CPU per token, Node = 1: ours 0.75" in shown
    assert "token p50, Node = 1: ours 0.50" in shown
    assert "token p99, Node = 1: ours 0.80" in shown
    assert "0.5 / 4 / 4" in shown
    assert "23.5" in shown
    assert "resume ms" not in shown


def test_the_json_has_every_round() -> None:
    """For whoever wants another statistic."""
    read = msgspec.json.decode(as_json([outcome(PACED, "ours", cpu_us_per_token=30.0)]))
    assert read["outcomes"][0]["rounds"][0]["cpu_us_per_token"] == 30.0
    assert read["outcomes"][0]["median"]["cpu_us_per_token"] == 30.0


def test_the_plot_is_an_svg_whose_bars_have_one_scale() -> None:
    """Names of any kind are escaped; nothing is drawn outside."""
    panels = panels_of(
        [
            outcome(PACED, "ours <&>", cpu_us_per_token=20.0, token_ms=latency(0.5, 4)),
            outcome(PACED, "Node", is_peer=True, cpu_us_per_token=40.0),
            outcome(BURST, "ours", cpu_us_per_token=7.0, token_ms=latency(500, 900)),
            outcome(IDLE, "ours", kb_per_socket=-3.0),
            outcome(RESUME, "ours", resume_ms=latency(5, 9)),
        ]
    )
    root = ET.fromstring(svg(panels))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", 0)) for bar in root.iter(f"{space}rect")][1:]
    assert bars[0] == pytest.approx(bars[1] / 2)
    assert min(bars) > 0
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert "ours <&>" in texts
    assert "40 µs" in texts
    assert not any("latency" in text and "burst" in text for text in texts)


def test_rows_are_judged_by_the_peer_of_the_same_run() -> None:
    """SQLite may cost a quarter more when paced, and nothing more in bursts."""
    outcomes = [
        outcome(PACED, MEMORY_V1, cpu_us_per_token=41.0, token_ms=latency(0.5, 3)),
        outcome(PACED, SQLITE_V1, cpu_us_per_token=49.0, token_ms=latency(1.5, 3)),
        outcome(PACED, "Node", is_peer=True, cpu_us_per_token=40.0, token_ms=latency(0.8, 4)),
        outcome(BURST, MEMORY_V1, cpu_us_per_token=7.0),
        outcome(BURST, SQLITE_V1, cpu_us_per_token=11.0),
        outcome(BURST, "Node", is_peer=True, cpu_us_per_token=10.0),
        outcome(FEW_IDLE, MEMORY_V1, kb_per_socket=25.0),
        outcome(MANY_IDLE, MEMORY_V1, resident_mb=290.0, cpu_percent=4.0),
        outcome(RESUME, MEMORY_V1, resume_ms=latency(8, 51)),
        *(
            outcome(step, MEMORY_V1, cpu_us_per_token=cpu)
            for step, cpu in zip(RAMP, (30.0, 36.0), strict=True)
        ),
    ]
    rows = rows_of(outcomes)
    assert [row.missed_by for row in rows] == [
        (MEMORY_V1,),
        (SQLITE_V1,),
        (SQLITE_V1,),
        (),
        (MEMORY_V1,),
        (),
        (),
        (MEMORY_V1,),
        (),
        (MEMORY_V1,),
        (),
    ]
    text = markdown(rows)
    assert text.splitlines()[-1].endswith("| not measured |")
    assert text.splitlines()[0] == "| what | target | memory v1 | SQLite v1 | Node | met |"
    assert "| 41.0 | 49.0 | 40.0 | no: memory v1 |" in text


def test_without_a_peer_its_rows_are_not_judged() -> None:
    """They would be met by whatever comes."""
    rows = rows_of([outcome(PACED, MEMORY_V1, cpu_us_per_token=41.0)])
    assert rows[0].met == "not measured"


def test_a_soak_of_another_run_gives_its_row() -> None:
    """The table takes minutes, a soak an hour."""
    trends = {"resident_mb": TrendRead(mean=100.0, slope_per_hour=6.0)}
    flat = {"resident_mb": TrendRead(mean=100.0, slope_per_hour=-6.0)}
    soaked = SoakRead(60.0, [SubjectRead("gateway memory://", flat), SubjectRead("gateway sqlite", trends)])
    row = rows_of([], soaked)[-1]
    assert row.cells == {MEMORY_V1: "-6.0", SQLITE_V1: "6.0"}
    assert row.missed_by == (SQLITE_V1,)


def test_steps_of_a_scenario_take_turns_and_none_is_always_first() -> None:
    """What the machine does meanwhile would else meet one of them only."""
    done: list[Step] = []

    class Counting(Runner):
        def load(self, step: Step, subject: Subject, running: Running) -> Measurement:
            done.append(step)
            return Measurement(sessions=1, wall_s=1.0)

    steps = SCENARIOS["ramp"][:2]
    Counting(lambda _text: None).run(steps, [Subject("x", LAUNCH)], 3)
    assert done[0].scenario == "warm-up"
    assert done[1:] == [*steps, *reversed(steps), *steps]


def test_one_accident_does_not_cost_the_other_rounds_of_a_fresh_process() -> None:
    """Tried twice and left out; an error only when there is no round at all."""

    class Failing(Runner):
        def load(self, step: Step, subject: Subject, running: Running) -> Measurement:
            if next(fates):
                raise BenchError("the connection was lost")
            return Measurement(sessions=1, wall_s=1.0)

    said: list[str] = []
    fates = iter([False, True, True, True, False])
    [found] = Failing(said.append).run([IDLE], [Subject("x", LAUNCH)], 3)
    assert len(found.rounds) == 2
    assert said.count("left out, because: the connection was lost") == 1
    fates = iter([True] * 4)
    with pytest.raises(BenchError):
        Failing(said.append).run([IDLE], [Subject("x", LAUNCH)], 2)


def test_neighbours_are_seen_in_the_figures_of_the_others() -> None:
    """Round by round against the same round without them, in percentiles and in those of a second."""
    alone = [Measurement(sessions=50, wall_s=1, token_ms=latency(1, 4), second_p99_ms=2.0)] * 3
    beside = [
        Measurement(sessions=50, wall_s=1, token_ms=latency(2, p99), second_p99_ms=3.0) for p99 in (4, 8, 40)
    ]
    ours = Subject("ours", LAUNCH)
    outcomes = [Outcome(FAIRNESS[0], ours, alone), Outcome(FAIRNESS[1], ours, beside)]
    shown = table(outcomes)
    assert "beside 1 session unpaced" in shown
    assert "token p50 2.00 (2.00 to 2.00), p99 2.00 (1.00 to 10.00), p99 of a second 1.50" in shown
    read = msgspec.json.decode(as_json(outcomes))
    assert [one["neighbours"] for one in read["outcomes"]] == [None, "1 session unpaced"]


def test_clients_that_never_read_differ_in_nothing_but_that() -> None:
    """The same sessions at the same pace in every step."""
    for step in STALLED:
        assert step.neighbours is not None
        assert step.neighbours.readers + step.neighbours.stalled == 10
        assert (step.sessions, step.tokens, step.pace) == (STALLED[0].sessions, STALLED[0].tokens, 0.02)
    assert "none of which never read" in STALLED[0].title
    assert "1 of which never read" in STALLED[1].title
    shown = table([outcome(STALLED_ALONE, "ours", closed_after_s=15.2, still_open=0, kb_per_stalled=900.0)])
    assert "closed after s" in shown
    assert "900.0" in shown


def test_a_spike_does_not_move_the_p99_of_a_second() -> None:
    """Only spans with enough tokens count."""
    calm = [*range(1_000_000, 101_000_000, 1_000_000)]
    assert median_p99_ms([*calm, *calm, *(one * 50 for one in calm)], [0, 100, 200, 300]) == 100.0
    assert median_p99_ms(calm, [0, 50]) is None


def test_the_ramp_of_the_table_is_the_ramp_of_the_scenario() -> None:
    """Figures of the two can be compared."""
    assert all(step == ramp_step(step.sessions) for step in RAMP)
    assert {step.sessions for step in RAMP} <= {step.sessions for step in SCENARIOS["ramp"]}


def test_a_launch_of_something_that_runs_needs_a_url() -> None:
    """What is wrong is said before anything is measured."""
    assert isinstance(running_launch("x", "ws://127.0.0.1:80", 1), Launch)
    with pytest.raises(Exception, match="no URL"):
        running_launch("x", "127.0.0.1:80", 1)
