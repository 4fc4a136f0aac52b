"""Pages of several processes become one that Prometheus reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gateway.core.worker_metrics import merge_pages

PAGE = b"""\
# HELP turns_total Turns {that} ended.
# TYPE turns_total counter
turns_total{outcome="a} b,worker"} %d
turns_total{outcome="c\\"{"} 2
# HELP lag_seconds Lag.
# TYPE lag_seconds histogram
lag_seconds_bucket{le="+Inf"} 3
lag_seconds_count 3
lag_seconds_sum 0.5
# HELP sessions Live sessions.
# TYPE sessions gauge
sessions 1e-05
"""
OWN = b"""\
# HELP worker_up Whether it answered.
# TYPE worker_up gauge
worker_up{worker="1"} 1.0
worker_up{worker="2"} 0.0
# HELP turns_total Turns {that} ended.
# TYPE turns_total counter
"""


def read(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All series of a page."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_every_series_says_whose_it_is() -> None:
    """All of each page is there, with the label added to those that it had."""
    merged = read(merge_pages({"1": PAGE % 5, "2": PAGE % 7}))

    for number, value in (("1", 5.0), ("2", 7.0)):
        alone = read(PAGE % value)
        own = {(name, labels - {("worker", number)}): held for (name, labels), held in merged.items()
               if ("worker", number) in labels}  # fmt: skip
        assert own == alone
    assert len(merged) == 2 * len(read(PAGE % 0))


def test_a_family_is_in_one_piece() -> None:
    """Its head once and its series right behind it, as the format demands."""
    lines = merge_pages({"1": PAGE % 5, "2": PAGE % 7}).splitlines()

    assert [line for line in lines if line.startswith(b"# TYPE")] == [
        b"# TYPE turns_total counter",
        b"# TYPE lag_seconds histogram",
        b"# TYPE sessions gauge",
    ]
    assert lines[0] == b"# HELP turns_total Turns {that} ended."
    assert all(line.startswith(b"turns_total{worker=") for line in lines[2:6])


def test_what_is_said_of_a_worker_keeps_its_label() -> None:
    """A supervisor speaks of others; a family without series is left out."""
    page = merge_pages({"supervisor": OWN})

    assert read(page) == {
        ("worker_up", frozenset({("worker", "1")})): 1.0,
        ("worker_up", frozenset({("worker", "2")})): 0.0,
    }
    assert b"turns_total" not in page
