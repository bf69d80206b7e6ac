"""The results as an SVG chart: one panel per figure, with bars for kproxy and its baseline in each run. No I/O."""

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
    "throughput to a VIP",
)

SUMMARY = ("first sync", "one endpoint", "RSS at peak", "connect to a VIP: median")
"""The panels of the small chart in the README."""

COLUMNS = 2
WIDTH, LABELS, VALUES = 520, 150, 80
"""Pixels: the width of a panel, and the parts of it for labels on the left and values on the right."""

BAR, PAIR, HEAD, FOOT, MARGIN = 9, 26, 34, 14, 16
COLORS = {"iptables": "#3b6ea8", "nftables": "#2f8f6b"}
BASELINE_COLOR = "#b9bec6"


class Bar(Struct, frozen=True):
    """A pair of bars: a figure and its baseline."""

    label: str
    mode: str
    figure: Figure


def chart(results: Results, shown: Sequence[str] = SHOWN) -> str:
    """Return the chart of some figures as SVG. Bars have a logarithmic scale, so each is labeled with its value."""
    panels = [(name, bars) for name in shown if (bars := list(_bars(results.runs, name)))]
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
    subtitle = f"Linux {machine.kernel}, {machine.cpus} CPUs, iptables {machine.iptables}, Python {machine.python}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + MARGIN}" '
            f'viewBox="0 0 {width} {top + MARGIN}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{top + MARGIN}" fill="white"/>',
            _text(MARGIN, 26, f"kproxy {machine.kproxy} ({machine.commit}) and baselines", size=16),
            _text(MARGIN, 44, f"{results.date}, {subtitle}; logarithmic, shorter is better", fill="#667"),
            *body,
            "</svg>\n",
        ]
    )


def share(value: float, low: float, high: float) -> float:
    """Return the position of a value between two others on a logarithmic scale, from 0 to 1."""
    if value <= low:
        return 0.0
    return min(1.0, math.log10(value / low) / math.log10(high / low))


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Return the powers of ten that enclose all positive values, at least one decade apart.

    The lower one is less than every value, so that every bar is visible.
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
    baselines = [bar.figure.baseline.value for bar in bars if bar.figure.baseline]
    low, high = decades([bar.figure.measured.value for bar in bars] + baselines)
    begin, room = left + LABELS, WIDTH - LABELS - VALUES - MARGIN
    baseline_is = next((bar.figure.baseline_is for bar in bars if bar.figure.baseline), "")
    remark = f"; gray: {baseline_is}" if baseline_is else ""
    unit = bars[0].figure.unit.replace("us", "µs")
    yield _text(left, top + 18, f"{name} ({unit}{remark})", size=13)
    y = top + HEAD
    for bar in bars:
        yield _text(begin - 8, y + BAR, bar.label, anchor="end")
        values = [(bar.figure.measured.value, COLORS.get(bar.mode, "#555"))]
        values += [(bar.figure.baseline.value, BASELINE_COLOR)] if bar.figure.baseline else []
        for index, (value, color) in enumerate(values):
            length = share(value, low, high) * room
            top_of_bar = y + index * (BAR + 1)
            yield f'<rect x="{begin}" y="{top_of_bar}" width="{length:.1f}" height="{BAR}" fill="{color}"/>'
            yield _text(begin + length + 5, top_of_bar + BAR - 1, number(value), size=10)
        y += PAIR


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", fill: str = "#223") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {attributes}>{escape(text)}</text>"
