"""What a soak says of its samples."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import msgspec
import pytest

from gateway.bench.gauges import parse_gauges
from gateway.bench.soak import Soak, SoakOutcome
from gateway.bench.soak_load import Sample
from gateway.bench.soak_report import read_soak, soak_json, soak_svg, soak_table
from gateway.bench.socket_client import BenchError
from gateway.bench.subjects import Subject, running_launch
from gateway.bench.trends import trend_of

SUBJECT = Subject("gateway <memory>", running_launch("x", "http://127.0.0.1:1", 1))


def sample(at_s: float, resident_mb: float, **figures: object) -> Sample:
    """One of many."""
    other: dict[str, object] = {
        **dict.fromkeys(("store_mb", "sessions_live", "sockets_open", "held_mb", "token_ms")),
        **dict.fromkeys(("descriptors", "cpu_s", "tokens", "turns", "sessions", "reconnects", "failures"), 7),
        "reasons": [],
    }
    return Sample(at_s=at_s, resident_mb=resident_mb, **{**other, **figures})  # type: ignore[arg-type]


def soaked(soak: Soak, per_hour: float) -> SoakOutcome:
    """A subject whose memory doubles in the warm-up and then grows by ``per_hour``."""
    seconds = range(0, int(soak.minutes * 60) + 1, 60)
    samples = [
        sample(at, 50 + 50 * min(at / soak.warm_up, 1) + per_hour * max(0, at - soak.warm_up) / 3600)
        for at in seconds
    ]
    return SoakOutcome(SUBJECT, soak.warm_up, samples)


def test_a_trend_is_the_line_with_the_least_squares() -> None:
    """In units per hour; of one point there is none."""
    assert trend_of([(5.0, 1.0)]) is None
    trend = trend_of([(0.0, 1.0), (1800.0, 4.0), (3600.0, 4.0)])
    assert trend is not None
    assert (trend.first, trend.last, trend.least, trend.most) == (1.0, 4.0, 1.0, 4.0)
    assert trend.mean == 3.0
    assert trend.slope_per_hour == pytest.approx(3.0)
    standing = trend_of([(7.0, 2.0), (7.0, 4.0)])
    assert standing is not None
    assert standing.slope_per_hour == 0.0


@pytest.mark.parametrize(("per_hour", "is_flat"), [(-20.0, True), (0.0, True), (4.9, True), (5.5, False)])
def test_only_what_comes_after_the_warm_up_counts(per_hour: float, is_flat: bool) -> None:
    """Until then there is less to keep than there will be."""
    _, trend = soaked(Soak(minutes=60), per_hour).trends()["resident_mb"]
    assert trend.first == pytest.approx(100.0)
    assert trend.slope_per_hour == pytest.approx(per_hour)
    assert trend.is_flat is is_flat


def test_the_table_the_json_and_the_plot_say_the_same() -> None:
    """Figures that nobody sampled are left out; a failure is told with its reason."""
    soak = Soak(minutes=60)
    outcome = soaked(soak, 8.0)
    outcome.samples[-1] = sample(3600.0, 108.0, failures=1, reasons=["s-1 (v1): no answer in time"])
    shown = soak_table(soak, [outcome])
    assert "resident MB" in shown
    assert "store file" not in shown
    assert "NO" in shown
    assert "1 failures" in shown
    assert "failed: s-1 (v1): no answer in time" in shown
    read = read_soak(soak_json(soak, [outcome]))
    assert read.minutes == 60
    assert read.outcomes[0].trends["resident_mb"].slope_per_hour == pytest.approx(8.0, rel=0.1)
    root = ET.fromstring(soak_svg(soak, [outcome]))
    assert "gateway <memory>" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_what_ends_early_is_no_error() -> None:
    """Ctrl-C shows what there was until then."""
    soak = Soak(minutes=60)
    shown = soak_table(soak, [SoakOutcome(SUBJECT, soak.warm_up, [sample(10.0, 70.0)])])
    assert "ended before the warm-up did" in shown
    assert soak_svg(soak, [SoakOutcome(SUBJECT, soak.warm_up)]).startswith("<svg")


def test_another_file_is_not_taken_for_a_soak() -> None:
    """What is wrong is said."""
    with pytest.raises(BenchError, match="soak --json"):
        read_soak(msgspec.json.encode({"outcomes": 3}))


def test_what_is_kept_for_a_time_is_let_go_within_the_warm_up() -> None:
    """Or an hour would measure windows that fill, and no growth."""
    assert Soak(minutes=60).settings["REPLAY_RETENTION"] == "600"
    for minutes in (1.0, 10.0, 60.0, 600.0):
        soak = Soak(minutes=minutes)
        longest = max(float(soak.settings[name]) for name in ("REPLAY_RETENTION", "DEDUPE_WINDOW"))
        assert longest <= soak.warm_up
        assert float(soak.settings["DETACH_GRACE"]) <= longest


def test_gauges_are_summed_over_their_labels() -> None:
    """Only those that a sample has."""
    text = (
        "# HELP gateway_sockets_open Open WebSockets.\n"
        'gateway_sockets_open{dialect="v1"} 3.0\n'
        'gateway_sockets_open{dialect="v2 json"} 4.0\n'
        "gateway_sessions_live 12.0\n"
        "gateway_sessions_live_more 1.0\n"
    )
    assert parse_gauges(text) == {"gateway_sockets_open": 7.0, "gateway_sessions_live": 12.0}
