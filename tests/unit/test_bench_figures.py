"""The benchmark's arithmetic: spreads, ratios, syncs, comparisons, scales."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.bench.catalog import CATALOG, NAMES, figures, with_memory_baselines
from tests.bench.chart import decades, share
from tests.bench.connections import percentile
from tests.bench.figures import FORMAT, Figure, Machine, Results, Run, Spread, compare, exact, mean, median, scaled
from tests.bench.report import number, spread
from tests.bench.testbed import count_syncs

SECOND = 1_000_000_000
MACHINE = Machine("6.1", 2, "cpu", 8.0, "3.11", "1.8", "0.1", "abc", 0.0)


def results(*runs: Run) -> Results:
    return Results(FORMAT, "2026-01-01T00:00:00+00:00", "small", 1.0, MACHINE, list(runs))


def run(value: Spread, *, mode: str = "iptables", services: int = 1000, endpoints: int = 10, unit: str = "ms") -> Run:
    return Run(mode, services, endpoints, [Figure("one endpoint", unit, value)])


def test_median_and_mean_have_a_range() -> None:
    assert median([9.0, 1.0, 2.0]) == Spread(2.0, 1.0, 9.0, 3)
    assert mean([9.0, 1.0, 2.0]) == Spread(4.0, 1.0, 9.0, 3)


@pytest.mark.parametrize("summed", [median, mean])
def test_figure_without_samples_is_an_error(summed: object) -> None:
    assert callable(summed)
    with pytest.raises(ValueError, match="at least one sample"):
        summed([])


def test_scaling_applies_to_the_whole_spread() -> None:
    assert scaled(Spread(2.0, 1.0, 4.0, 3), 1000.0) == Spread(2000.0, 1000.0, 4000.0, 3)


@pytest.mark.parametrize(("baseline", "ratio"), [(exact(2.0), 3.0), (exact(0.0), None), (None, None)])
def test_ratio_is_relative_to_the_baseline(baseline: Spread | None, ratio: float | None) -> None:
    assert Figure("one endpoint", "ms", exact(6.0), baseline).ratio == ratio


@pytest.mark.parametrize(("share", "value"), [(50, 3), (99, 5), (100, 5), (20, 1), (21, 2), (0, 1)])
def test_percentile_by_nearest_rank(share: float, value: float) -> None:
    assert percentile([5, 3, 1, 4, 2], share) == value


def test_p99_excludes_one_sample_in_a_hundred() -> None:
    assert percentile(range(1, 201), 99) == 198


@pytest.mark.parametrize(
    ("times", "syncs"),
    [
        ([], 0),
        ([7 * SECOND], 1),
        ([7 * SECOND, 7 * SECOND + 200_000_000], 1),
        ([7 * SECOND, 7 * SECOND + 300_000_000], 2),
        ([7 * SECOND, 7 * SECOND + 200_000_000, 7 * SECOND + 400_000_000, 9 * SECOND], 2),
    ],
)
def test_commits_close_together_are_one_sync(times: list[int], syncs: int) -> None:
    assert count_syncs(times) == syncs


def test_comparison_is_new_by_old_for_the_same_mode_size_and_unit() -> None:
    old = results(run(exact(4.0)), run(exact(1.0), mode="nftables"), run(exact(1.0), services=5000))
    new = results(run(exact(8.0)), run(exact(2.0), services=10_000), run(exact(3.0), mode="nftables", unit="s"))
    (row,) = compare(old, new)
    assert (row.mode, row.services, row.old, row.new, row.ratio) == ("iptables", 1000, 4.0, 8.0, 2.0)


def test_endpoints_are_part_of_the_size() -> None:
    assert list(compare(results(run(exact(4.0))), results(run(exact(4.0), endpoints=5)))) == []


@pytest.mark.parametrize(
    ("new", "disjoint"),
    [
        (Spread(6.0, 5.1, 7.0, 3), True),
        (Spread(6.0, 5.0, 7.0, 3), False),
        (Spread(2.0, 1.0, 2.9, 3), True),
        (Spread(2.0, 1.0, 3.0, 3), False),
        (Spread(4.0, 1.0, 9.0, 3), False),
    ],
)
def test_difference_is_significant_if_the_spreads_do_not_touch(new: Spread, disjoint: bool) -> None:
    (row,) = compare(results(run(Spread(4.0, 3.0, 5.0, 3))), results(run(new)))
    assert row.disjoint is disjoint


def test_no_ratio_to_zero() -> None:
    (row,) = compare(results(run(exact(0.0))), results(run(exact(8.0))))
    assert row.ratio is None


def test_samples_become_figures_in_the_order_of_the_catalog() -> None:
    ordered = figures({"burst": [2.0], "first sync": [1.0, 3.0]}, {"burst": [0.5]})
    assert [figure.name for figure in ordered] == ["first sync", "burst"]
    assert ordered[0].measured == Spread(2.0, 1.0, 3.0, 2)
    assert (ordered[0].baseline, ordered[0].baseline_is) == (None, "")
    assert (ordered[1].measured.value, ordered[1].unit, ordered[1].ratio) == (2000.0, "ms", 4.0)


def test_cpu_time_is_averaged_because_it_is_measured_in_ticks() -> None:
    (cpu_time,) = figures({"one endpoint: CPU": [0.0, 0.0, 0.03]}, {})
    assert cpu_time.measured.value == pytest.approx(10.0)


def test_unknown_figure_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="unknown figure: frist sync"):
        figures({"frist sync": [1.0]}, {})


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(CATALOG)


@pytest.mark.parametrize(
    ("values", "between"),
    [([2.0, 30.0], (1.0, 100.0)), ([1.0], (0.1, 1.0)), ([0.0], (0.1, 1.0)), ([0.02, 0.0], (0.01, 0.1))],
)
def test_scale_gives_every_value_a_visible_bar(values: list[float], between: tuple[float, float]) -> None:
    assert decades(values) == pytest.approx(between)


def test_bars_are_logarithmic() -> None:
    assert [share(value, 1.0, 100.0) for value in (0.0, 1.0, 10.0, 100.0)] == pytest.approx([0.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0.0, "0"), (3, "3")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Spread(4.0, 3.0, 10.0, 3), "-25% +150%"),
        (Spread(4.0, 4.0, 4.0, 2), "+0% +0%"),
        (exact(4.0), ""),
        (Spread(0.0, 0.0, 0.0, 2), ""),
    ],
)
def test_spread_is_printed_in_percent(value: Spread, text: str) -> None:
    assert spread(value) == text


def test_memory_baseline_is_the_memory_with_one_service_in_the_same_mode() -> None:
    def memory(mode: str, services: int, value: float, name: str = "RSS at peak") -> Run:
        return Run(mode, services, 10, [Figure(name, "MB", exact(value)), Figure("burst", "ms", exact(1.0))])

    runs = [memory("iptables", 1, 50.0), memory("nftables", 1, 40.0), memory("nftables", 1000, 80.0)]
    with_baselines = with_memory_baselines(runs)
    assert [run.figures[0].ratio for run in with_baselines] == [1.0, 1.0, 2.0]
    assert [replace(run, figures=run.figures[1:]) for run in with_baselines] == [
        replace(run, figures=run.figures[1:]) for run in runs
    ]
