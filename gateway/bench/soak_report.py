"""A soak's outcome as a table, as JSON, and as lines over time."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import msgspec

from gateway.bench.report import aligned, machine
from gateway.bench.soak import JUDGED, Soak, SoakOutcome
from gateway.bench.socket_client import BenchError

_WIDTH, _HEIGHT = 900, 220
_LEFT, _TOP, _BOTTOM = 60, 44, 30
_COLORS = ("#2563a8", "#c2571a", "#2e7d4f", "#7a4ea3")
_TEXT, _LINE, _WARM_UP = "#1c2733", "#d5dbe1", "#f2f4f7"


class TrendRead(msgspec.Struct, frozen=True):
    """A trend in a soak's JSON."""

    mean: float
    slope_per_hour: float


class SubjectRead(msgspec.Struct, frozen=True):
    """A subject in a soak's JSON."""

    subject: str
    trends: dict[str, TrendRead]


class SoakRead(msgspec.Struct, frozen=True):
    """What others want to know of a soak's JSON."""

    minutes: float
    outcomes: list[SubjectRead]


def read_soak(data: bytes) -> SoakRead:
    """A soak from what ``soak_json`` wrote. Raises ``BenchError``."""
    try:
        return msgspec.json.decode(data, type=SoakRead)
    except msgspec.DecodeError as error:
        raise BenchError(f"that is not what `gateway bench soak --json` writes: {error}") from None


def soak_table(soak: Soak, outcomes: Sequence[SoakOutcome]) -> str:
    """What was sampled after the warm-up, and whether it grew."""
    blocks = []
    for outcome in outcomes:
        if not outcome.samples:
            continue
        end = outcome.samples[-1]
        rows = [
            {
                "": title,
                "first": f"{trend.first:.1f}",
                "last": f"{trend.last:.1f}",
                "least": f"{trend.least:.1f}",
                "most": f"{trend.most:.1f}",
                "per hour": f"{trend.slope_per_hour:+.2f}",
                "%": f"{trend.slope_per_hour / trend.mean * 100 if trend.mean else 0.0:+.1f}",
                "flat": "" if name not in JUDGED else "yes" if trend.is_flat else "NO",
            }
            for name, (title, trend) in outcome.trends().items()
        ]
        lines = [
            f"soak: {outcome.subject.name}, {soak.sessions} sessions at a time, a token each "
            f"{soak.pace * 1000:g} ms; the last "
            f"{(end.at_s - soak.warm_up) / 60:.3g} of {end.at_s / 60:.3g} min"
        ]
        lines += [aligned(rows)] if rows else ["  ended before the warm-up did"]
        lines.append(
            f"  in all: {end.turns:,} turns, {end.tokens:,} tokens, {end.sessions:,} sessions, "
            f"{end.reconnects:,} reconnects, {end.failures} failures, {end.cpu_s:.0f} s of CPU"
        )
        lines += [f"  failed: {reason}" for reason in end.reasons]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def soak_json(soak: Soak, outcomes: Sequence[SoakOutcome]) -> bytes:
    """Every sample, and the trends."""
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "machine": machine(),
                "scenario": "soak",
                "minutes": soak.minutes,
                "sessions": soak.sessions,
                "pace_s": soak.pace,
                "warm_up_s": soak.warm_up,
                "settings": soak.settings,
                "outcomes": [
                    {
                        "subject": outcome.subject.name,
                        "trends": {
                            name: {
                                "first": trend.first,
                                "last": trend.last,
                                "least": trend.least,
                                "most": trend.most,
                                "mean": trend.mean,
                                "slope_per_hour": trend.slope_per_hour,
                                "is_flat": trend.is_flat,
                            }
                            for name, (_, trend) in outcome.trends().items()
                        },
                        "samples": outcome.samples,
                    }
                    for outcome in outcomes
                ],
            }
        ),
        indent=2,
    )


def soak_svg(soak: Soak, outcomes: Sequence[SoakOutcome]) -> str:
    """Resident memory over time, from 0, a line for each subject; the warm-up is shaded."""
    largest = max((sample.resident_mb for outcome in outcomes for sample in outcome.samples), default=1.0)
    room, high = _WIDTH - 2 * _LEFT, _HEIGHT - _TOP - _BOTTOM
    seconds = soak.minutes * 60

    def x(at: float) -> float:
        return _LEFT + at / seconds * room

    def y(value: float) -> float:
        return _TOP + high * (1 - value / largest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" fill="{_TEXT}" font-family="system-ui, sans-serif" '
        'font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{x(soak.warm_up) - _LEFT:.1f}" height="{high}" '
        f'fill="{_WARM_UP}"/>',
        f'<text x="16" y="22" font-weight="600">resident memory over {soak.minutes:g} minutes, MB</text>',
    ]
    for value in (0.0, largest / 2, largest):
        parts += [
            f'<line x1="{_LEFT}" y1="{y(value):.1f}" x2="{_LEFT + room}" y2="{y(value):.1f}" '
            f'stroke="{_LINE}"/>',
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>',
        ]
    for number, outcome in enumerate(outcomes):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(f"{x(sample.at_s):.1f},{y(sample.resident_mb):.1f}" for sample in outcome.samples)
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>',
            f'<text x="{_LEFT + 180 * number}" y="{_HEIGHT - 8}" fill="{color}">'
            f"{escape(outcome.subject.name)}</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])
