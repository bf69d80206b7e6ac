"""The report of `kproxy top`: sums, order, rates."""

from __future__ import annotations

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.cli.output import WIDTH, Style
from kproxy.cli.top import top_lines
from kproxy.diagnose.report import document, schema
from kproxy.diagnose.top import CountedAddress, Elapsed, Top, TopOrder, TopQuery, make_top
from kproxy.model.connection_counts import ConnectionCounts, Counts, Destination
from kproxy.model.types import Family

WEB, API = "shop/web:http", "shop/api"


def counts(web: int, api: int, *, web_endpoints: tuple[int, int] = (0, 0), web_ipv6: int = 0) -> Counts:
    first, second = web_endpoints
    return {
        Family.IPV4: ConnectionCounts(
            {Destination(WEB, "10.96.0.1:80/TCP"): web, Destination(API, "10.96.0.2:80/TCP"): api},
            {Destination(WEB, "10.244.0.1:80"): first, Destination(WEB, "10.244.0.2:80"): second},
        ),
        Family.IPV6: ConnectionCounts({Destination(WEB, "[fd00::1]:80/TCP"): web_ipv6}),
    }


def order(query: TopOrder, found: Counts, earlier: Elapsed | None = None, limit: int = 0) -> list[str]:
    report = make_top("nftables", found, earlier, TopQuery(order=query, limit=limit))
    Draft202012Validator(schema(Top)).validate(document(report))
    return [each.service for each in report.services]


def test_families_are_added_and_frontends_make_up_the_sum() -> None:
    report = make_top("nftables", counts(5, 3, web_endpoints=(4, 9), web_ipv6=2), None, TopQuery(details=True))
    web, api = report.services
    assert (web.namespace, web.service, web.port, web.connections) == ("shop", "web", "http", 7)
    assert (api.port, api.connections, report.connections) == ("", 3, 10)
    assert [(each.address, each.connections) for each in web.endpoints] == [("10.244.0.2:80", 9), ("10.244.0.1:80", 4)]
    assert [each.address for each in web.frontends] == ["10.96.0.1:80/TCP", "[fd00::1]:80/TCP"]
    assert report.rate is web.rate is None


def test_without_frontends_endpoints_make_up_the_sum() -> None:
    found = {Family.IPV4: ConnectionCounts(endpoints={Destination(WEB, "a:1"): 2, Destination(WEB, "b:1"): 3})}
    assert make_top("iptables", found, None, TopQuery()).connections == 5


def test_order() -> None:
    before, now = counts(10, 0), counts(11, 5)
    assert order("connections", now) == ["web", "api"]
    assert order("name", now) == ["api", "web"]
    assert order("rate", now, Elapsed(before, 2.0)) == ["api", "web"]
    assert order("connections", now, limit=1) == ["web"]


def test_rates_of_counters_that_started_again() -> None:
    before, now = counts(10, 8, web_endpoints=(9, 1)), counts(16, 2, web_endpoints=(1, 3))
    report = make_top("nftables", now, Elapsed(before, 2.0), TopQuery(details=True))
    assert [each.rate for each in report.services] == [3.0, 1.0]
    assert report.rate == 4.0
    assert report.services[0].endpoints == (
        CountedAddress(address="10.244.0.2:80", connections=3, rate=1.0),
        CountedAddress(address="10.244.0.1:80", connections=1, rate=0.5),
    )


def test_one_service() -> None:
    report = make_top("nftables", counts(5, 3), None, TopQuery(service="shop/api"))
    assert [each.service for each in report.services] == ["api"]
    assert report.connections == 3
    assert make_top("nftables", counts(5, 3), None, TopQuery(service="shop/a")).services == ()


def test_text() -> None:
    query = TopQuery(details=True, limit=1)
    report = make_top("nftables", counts(5_000, 3, web_endpoints=(4, 9)), Elapsed(counts(0, 0), 4.0), query)
    lines = list(top_lines(report, query, Style()))
    assert lines == [
        "SERVICE                  CONNECTIONS       RATE",
        "shop/web:http                  5,000  1,250.0/s",
        "  from 10.96.0.1:80/TCP        5,000  1,250.0/s",
        "  from [fd00::1]:80/TCP            0      0.0/s",
        "  to 10.244.0.2:80                 9      2.2/s",
        "  to 10.244.0.1:80                 4      1.0/s",
        "and 1 more",
        "all                            5,003  1,250.8/s",
    ]
    assert max(map(len, lines)) <= WIDTH
