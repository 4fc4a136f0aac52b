"""Outcomes as one SVG: a panel of bars for each figure of each step. No more SVG than that needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from attrs import frozen

from gateway.bench.load import Measurement
from gateway.bench.runner import Outcome

_WIDTH = 900
_LABELS = 250
_VALUES = 90
_ROW = 24
_TITLE = 44
_GAP = 18
_GATEWAY, _PEER, _TEXT, _LINE = "#2563a8", "#9aa5b1", "#1c2733", "#d5dbe1"


@frozen
class Panel:
    """Bars under one title: label, value, whether it is a peer's."""

    title: str
    unit: str
    bars: tuple[tuple[str, float, bool], ...]


_FIGURES: tuple[tuple[str, str, Callable[[Measurement], float | None]], ...] = (
    ("CPU per token", "µs", lambda measured: measured.cpu_us_per_token),
    ("added latency per token, p50", "ms", lambda measured: (measured.token_ms or {}).get("p50")),
    ("added latency per token, p99", "ms", lambda measured: (measured.token_ms or {}).get("p99")),
    ("first token, p99", "ms", lambda measured: (measured.first_token_ms or {}).get("p99")),
    ("resume, p99", "ms", lambda measured: (measured.resume_ms or {}).get("p99")),
)
_MEMORY = ("memory per idle socket", "KB", lambda measured: measured.kb_per_socket)
_STALLED = ("memory per client that never reads", "KB", lambda measured: measured.kb_per_stalled)


def panels_of(outcomes: Sequence[Outcome]) -> list[Panel]:
    """What there is to show: of a ramp CPU alone, and of bursts, whose latency is all queue."""
    panels = []
    for step in dict.fromkeys(outcome.step for outcome in outcomes):
        mine = [(outcome, outcome.median()) for outcome in outcomes if outcome.step == step]
        figures = (_MEMORY,) if step.kind == "idle" else _FIGURES
        if step.scenario in ("ramp", "burst"):
            figures = _FIGURES[:1]
        elif step.kind == "neighbours":
            figures = (_STALLED,)
        for name, unit, get in figures:
            bars = tuple(
                (outcome.subject.name, value, outcome.subject.is_peer)
                for outcome, measured in mine
                if (value := get(measured)) is not None
            )
            if bars:
                panels.append(Panel(f"{name} — {step.title}", unit, bars))
    return panels


def svg(panels: Sequence[Panel]) -> str:
    """The panels below each other, each with its own scale from 0."""
    height = _GAP + sum(_TITLE + _ROW * len(panel.bars) + _GAP for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13" fill="{_TEXT}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = _GAP
    for panel in panels:
        parts += _panel(panel, top)
        top += _TITLE + _ROW * len(panel.bars) + _GAP
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: int) -> list[str]:
    room = _WIDTH - _LABELS - _VALUES
    largest = max((value for _, value, _ in panel.bars), default=0.0) or 1.0
    parts = [f'<text x="16" y="{top + 22}" font-weight="600">{escape(panel.title)}</text>']
    first = top + _TITLE - 8
    parts.append(
        f'<line x1="{_LABELS}" y1="{first}" x2="{_LABELS}" y2="{first + _ROW * len(panel.bars)}" '
        f'stroke="{_LINE}"/>'
    )
    for index, (label, value, is_peer) in enumerate(panel.bars):
        y = first + _ROW * index
        width = max(1.0, value / largest * room)
        color = _PEER if is_peer else _GATEWAY
        parts += [
            f'<text x="{_LABELS - 10}" y="{y + 16}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{_LABELS}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2" '
            f'fill="{color}"/>',
            f'<text x="{_LABELS + width + 8:.1f}" y="{y + 16}">{value:.3g} {escape(panel.unit)}</text>',
        ]
    return parts
