"""Results as a chart in SVG: a panel for each figure, in it two bars, kproxy and floor, for each run. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from msgspec import Struct

from tests.bench.figures import Figure, Results, Run
from tests.bench.report import number

SHOWN = (
    "first sync",
    "one endpoint",
    "new Service",
    "burst",
    "one endpoint: CPU",
    "event, protobuf: CPU",
    "RSS at peak",
    "connect to a VIP: median",
)

COLUMNS = 2
WIDTH, LABELS, VALUES = 520, 150, 80
"""Width of a panel, and what of it is for the names of bars on the left and for their values on the right."""

BAR, PAIR, HEAD, FOOT, MARGIN = 9, 26, 34, 14, 16
COLOURS = {"iptables": "#3b6ea8", "nftables": "#2f8f6b"}
FLOOR_COLOUR = "#b9bec6"


class Bar(Struct, frozen=True):
    """What one pair of bars shows."""

    label: str
    mode: str
    figure: Figure


def chart(results: Results) -> str:
    """Return the chart. Bars are logarithmic: next to each stands its value."""
    panels = [(name, bars) for name in SHOWN if (bars := list(_bars(results.runs, name)))]
    rows = [panels[begin : begin + COLUMNS] for begin in range(0, len(panels), COLUMNS)]
    heights = [max(_height(len(bars)) for _, bars in row) for row in rows]
    width = COLUMNS * WIDTH + MARGIN
    top = 64
    body: list[str] = []
    for row, height in zip(rows, heights, strict=True):
        for column, (name, bars) in enumerate(row):
            body += _panel(name, bars, MARGIN + column * WIDTH, top)
        top += height
    machine = results.machine
    below = f"Linux {machine.kernel}, {machine.cpus} CPUs, iptables {machine.iptables}, Python {machine.python}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + MARGIN}" '
            f'viewBox="0 0 {width} {top + MARGIN}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{top + MARGIN}" fill="white"/>',
            _text(MARGIN, 26, f"kproxy {machine.kproxy} ({machine.commit}) beside its floors", size=16),
            _text(MARGIN, 44, f"{results.date}, {below}; logarithmic, shorter is better", fill="#667"),
            *body,
            "</svg>\n",
        ]
    )


def share(value: float, low: float, high: float) -> float:
    """Return where a value is between two powers of ten, from 0 to 1."""
    if value <= low:
        return 0.0
    return min(1.0, math.log10(value / low) / math.log10(high / low))


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Return the powers of ten around all values that are greater than 0, at least one decade apart.

    The lower one is less than every value, so that each has a bar to be seen.
    """
    positive = [value for value in values if value > 0] or [1.0]
    low = 10.0 ** (math.ceil(math.log10(min(positive))) - 1)
    return low, max(10.0 ** math.ceil(math.log10(max(positive))), low * 10)


def _bars(runs: Sequence[Run], name: str) -> Iterator[Bar]:
    for run in sorted(runs, key=lambda run: (run.mode, run.services)):
        for figure in run.figures:
            if figure.name == name:
                yield Bar(f"{run.mode} {run.services:,}", run.mode, figure)


def _height(bars: int) -> int:
    return HEAD + bars * PAIR + FOOT


def _panel(name: str, bars: Sequence[Bar], left: int, top: int) -> Iterator[str]:
    floors = [bar.figure.floor.value for bar in bars if bar.figure.floor]
    low, high = decades([bar.figure.found.value for bar in bars] + floors)
    begin, room = left + LABELS, WIDTH - LABELS - VALUES - MARGIN
    floor_is = next((bar.figure.floor_is for bar in bars if bar.figure.floor), "")
    remark = f"; grey: {floor_is}" if floor_is else ""
    yield _text(left, top + 18, f"{name} ({bars[0].figure.unit}{remark})", size=13)
    y = top + HEAD
    for bar in bars:
        yield _text(begin - 8, y + BAR, bar.label, anchor="end")
        pairs = [(bar.figure.found.value, COLOURS.get(bar.mode, "#555"))]
        pairs += [(bar.figure.floor.value, FLOOR_COLOUR)] if bar.figure.floor else []
        for place, (value, colour) in enumerate(pairs):
            length = share(value, low, high) * room
            height = y + place * (BAR + 1)
            yield f'<rect x="{begin}" y="{height}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>'
            yield _text(begin + length + 5, height + BAR - 1, number(value), size=10)
        y += PAIR


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", fill: str = "#223") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place}>{escape(text)}</text>"
