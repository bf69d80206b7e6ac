"""Figures in the documentation match the committed benchmark results, so pages cannot contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from tests.bench.chart import SHOWN, SUMMARY, chart
from tests.bench.figures import Results

ROOT = Path(__file__).parents[2]
HISTORY = ROOT / "tests" / "bench" / "history"

SOURCE = "2026-11-21-be62721-medium"
"""The results that all pages quote, except for sizes that were not measured in this run."""

OTHERS = {
    ("nftables", 20_000): "2026-11-21-369abb4-nftables-20000",
    ("iptables", 10_000): "2026-11-21-18c16b1-iptables-10000",
}


class Quoted(NamedTuple):
    """The figures of one mode and size that a table cell quotes, in the order of the numbers in the cell."""

    mode: str
    services: int
    names: tuple[str, ...]


FIRST, CHANGED, MEMORY = "first sync", "one endpoint", "RSS after first sync"

README = {
    "From one endpoint change to the commit in the kernel": Quoted("nftables", 10_000, (CHANGED,)),
    "From the start of the process to the first full sync": Quoted("nftables", 10_000, (FIRST,)),
    "Memory after the first sync": Quoted("nftables", 10_000, (MEMORY,)),
}
COMPARISON = {
    "nftables, 10,000 Services: one endpoint changed": Quoted("nftables", 10_000, (CHANGED,)),
    "nftables, 10,000 Services: CPU time of that change": Quoted("nftables", 10_000, (f"{CHANGED}: CPU",)),
    "nftables, 10,000 Services: first full sync": Quoted("nftables", 10_000, (FIRST,)),
    "nftables, 10,000 Services: memory": Quoted("nftables", 10_000, (MEMORY,)),
    "nftables, 1,000 Services: first full sync": Quoted("nftables", 1_000, (FIRST,)),
    "nftables, 1,000 Services: memory": Quoted("nftables", 1_000, (MEMORY,)),
    "iptables (nf_tables), 1,000 Services: one endpoint changed": Quoted("iptables", 1_000, (CHANGED,)),
    "iptables (nf_tables), 1,000 Services: first full sync": Quoted("iptables", 1_000, (FIRST,)),
    "iptables (nf_tables), 1,000 Services: memory": Quoted("iptables", 1_000, (MEMORY,)),
    "iptables (nf_tables), 5,000 Services: first full sync": Quoted("iptables", 5_000, (FIRST,)),
}
PERFORMANCE = {
    "first sync, from the start of the process": (FIRST,),
    "one endpoint changed: until the commit": (CHANGED,),
    "one endpoint changed": (CHANGED,),
    "one endpoint changed: CPU": (f"{CHANGED}: CPU",),
    "new Service": ("new Service",),
    "1,000 changes at once": ("burst",),
    "memory after the first sync, after 9,000 changes": (MEMORY, "RSS after changes"),
    "memory after the first sync, after changes": (MEMORY, "RSS after changes"),
}
"""The figures that each row of the result tables quotes. The columns of these tables are cluster sizes."""

_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)(?= (ms|s|MB|µs)|, )")


def figure(mode: str, services: int, name: str) -> tuple[float, str]:
    """Return the value and the unit of a figure of the benchmark."""
    file = HISTORY / f"{OTHERS.get((mode, services), SOURCE)}.json"
    results = msgspec.json.decode(file.read_bytes(), type=Results)
    (match,) = [
        item
        for run in results.runs
        if (run.mode, run.services) == (mode, services)
        for item in run.figures
        if item.name == name
    ]
    return match.measured.value, match.unit


def quotes(text: str, value: float, unit: str, text_unit: str) -> bool:
    """Return whether the number `text` on a page is the given value, rounded to as many decimals as it has."""
    scale = {("s", "ms"): 1000.0, ("ms", "s"): 0.001}.get((unit, text_unit), 1.0)
    decimals = len(text.partition(".")[2])
    return f"{value * scale:,.{decimals}f}" == text


def table(page: str, label: str) -> list[list[str]]:
    """Return the cells of all rows of the first table that has a row with this label."""
    lines = (ROOT / page).read_text().splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith(f"| {label} |"))
    first = next(number for number in range(row, -1, -1) if not lines[number].startswith("|")) + 1
    end = next(number for number in range(row, len(lines) + 1) if number == len(lines) or lines[number][:1] != "|")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:end]]


@pytest.mark.parametrize(
    ("page", "rows"), [("README.md", README), ("docs/comparison.md", COMPARISON)], ids=["readme", "comparison"]
)
def test_rows_match_the_benchmark(page: str, rows: dict[str, Quoted]) -> None:
    documented = {cells[0]: cells[1] for cells in table(page, next(iter(rows)))[2:]}
    assert documented.keys() == rows.keys()
    for label, cell in documented.items():
        quoted = rows[label]
        numbers = _NUMBER.findall(f"{cell} ")
        assert len(numbers) == len(quoted.names), (label, cell)
        for (text, text_unit), name in zip(numbers, quoted.names, strict=True):
            value, unit = figure(quoted.mode, quoted.services, name)
            assert quotes(text, value, unit, text_unit), f"{page}: {label}: {text} {text_unit}, measured {value} {unit}"


def cells_of_results() -> Iterator[tuple[str, int, str, str]]:
    for mode in ("nftables mode", "iptables mode (nf_tables)"):
        head, _, *rows = table("docs/performance.md", mode)
        sizes = [int(text.replace(",", "")) for text in head[1:-1]]
        for label, *cells, _bound in rows:
            if label in PERFORMANCE:
                for services, cell in zip(sizes, cells, strict=True):
                    yield mode.split()[0], services, label, cell


@pytest.mark.parametrize(("mode", "services", "label", "cell"), list(cells_of_results()))
def test_result_tables_match_the_benchmark(mode: str, services: int, label: str, cell: str) -> None:
    numbers, names = _NUMBER.findall(cell), PERFORMANCE[label]
    assert len(numbers) == len(names), cell
    unit_of_cell = numbers[-1][1]
    for (text, text_unit), name in zip(numbers, names, strict=True):
        value, unit = figure(mode, services, name)
        assert quotes(text, value, unit, text_unit or unit_of_cell), f"{text}, measured {value} {unit}"


def test_readme_and_makefile_state_the_same_demo_duration() -> None:
    phrase = "less than half a minute"
    assert phrase in " ".join((ROOT / "README.md").read_text().split())
    assert phrase in next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("demo:"))


def test_pages_state_the_measured_cost_of_an_event() -> None:
    runs = msgspec.json.decode((HISTORY / f"{SOURCE}.json").read_bytes(), type=Results).runs
    ranges = {}
    for form in ("JSON", "protobuf"):
        milliseconds = [
            item.measured.value / 1000 for run in runs for item in run.figures if item.name == f"event, {form}: CPU"
        ]
        ranges[form] = f"{min(milliseconds):.2f} to {max(milliseconds):.2f} ms"
    performance = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    comparison = " ".join((ROOT / "docs" / "comparison.md").read_text().split())
    assert f"{ranges['JSON']} of CPU in JSON, {ranges['protobuf']} in protobuf" in performance
    assert ranges["protobuf"] in comparison
    size, _ = figure("nftables", 10_000, "event, protobuf: bytes")
    assert f"{size:,.0f} in protobuf" in performance
    assert f"{size:,.0f}-byte protobuf event" in comparison


@pytest.mark.parametrize(("name", "shown"), [("bench", SHOWN), ("bench-summary", SUMMARY)])
def test_committed_charts_show_the_committed_results(name: str, shown: Sequence[str]) -> None:
    results = msgspec.json.decode((HISTORY / f"{SOURCE}.json").read_bytes(), type=Results)
    assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == chart(results, shown)
