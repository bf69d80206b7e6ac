"""What happens to NodePorts on loopback addresses: the decision, the listeners of plans, the choice of endpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import pytest
from msgspec.structs import replace

from kproxy.app.localhost_listeners import ListeningBackend
from kproxy.app.localhost_node_ports import GATE, localhost_traffic, names_loopback, wants_localhost_proxy
from kproxy.config import load_config
from kproxy.config.types import Config
from kproxy.model.context import Context, LocalhostTraffic
from kproxy.model.localhost_node_ports import EndpointChoice, LocalhostListener, localhost_listeners, proxied_address
from kproxy.model.plan import ServicePortPlan, plan_service
from kproxy.model.sync_report import ApplyResult, SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Protocol, Service, ServiceKey, ServicePort
from kproxy.nftables import names
from kproxy.nftables.diff import NftablesDiff
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.render import render_service
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import Packet
from tests.unit.test_trace_walk import ask

V4, V6 = Family.IPV4, Family.IPV6
CONTEXT = Context(V4, "node-1", localhost_traffic="proxy-hold")


@pytest.mark.parametrize(
    ("setting", "family", "named"),
    [
        ((), V4, False),
        (("primary",), V4, False),
        (("all",), V4, False),
        (("all",), V6, False),
        (("0.0.0.0/0", "::/0"), V4, False),
        (("0.0.0.0/0", "::/0"), V6, False),
        (("126.0.0.0/7",), V4, False),
        (("localhost",), V4, True),
        (("primary", "localhost"), V6, True),
        (("all", "localhost"), V4, True),
        (("127.0.0.0/8",), V4, True),
        (("127.0.0.0/8",), V6, False),
        (("127.0.0.1/32",), V4, True),
        (("10.0.0.0/8", "::1/128"), V6, True),
        (("10.0.0.0/8", "::1/128"), V4, False),
    ],
)
def test_loopback_ranges_must_be_named(setting: tuple[str, ...], family: Family, named: bool) -> None:
    assert names_loopback(setting, family) is named


def config(mode: str, cidrs: str = "", gate: bool | None = None) -> Config:
    text = "\n".join(
        [
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1",
            "kind: KubeProxyConfiguration",
            f"mode: {mode}",
            f"nodePortAddresses: [{cidrs}]",
            "" if gate is None else f"featureGates: {{{GATE}: {str(gate).lower()}}}",
        ]
    )
    return load_config(text.encode(), "kp.yaml")[0]


@pytest.mark.parametrize(
    ("settings", "has_proxy", "can_hold", "expected"),
    [
        (config("nftables"), True, True, "reject"),
        (config("nftables", "10.0.0.0/8"), True, True, "reject"),
        (config("nftables", "127.0.0.0/8"), True, True, "proxy-hold"),
        (config("nftables", "127.0.0.0/8", gate=True), True, True, "proxy-hold"),
        (config("nftables", "127.0.0.0/8"), True, False, "proxy"),
        (config("nftables", "127.0.0.0/8"), False, True, "reject"),
        (config("nftables", "127.0.0.0/8", gate=False), True, True, ""),
        (config("nftables", gate=False), True, True, ""),
        (config("iptables", "127.0.0.0/8"), True, True, ""),
    ],
)
def test_traffic_to_localhost(settings: Config, has_proxy: bool, can_hold: bool, expected: LocalhostTraffic) -> None:
    assert localhost_traffic(settings, V4, has_proxy=has_proxy, can_hold=can_hold) == expected
    assert wants_localhost_proxy(settings, V4) is (expected.startswith("proxy") or not has_proxy)


# Plans


def plans(
    numbers: Sequence[int],
    *,
    context: Context = CONTEXT,
    name: str = "web",
    protocol: Protocol = "TCP",
    node_port: int = 30080,
    here: Sequence[int] = (),
    **more: Any,
) -> tuple[ServicePortPlan, ...]:
    service = Service("ns", name, ("10.96.0.1",), (ServicePort("", 80, protocol, node_port),), **more)
    endpoints = tuple(Endpoint(f"10.244.0.{each}", "node-1" if each in here else "node-2") for each in numbers)
    slices = [EndpointSlice("ns", name, f"ns/{name}", V4, endpoints, (EndpointPort("", 8080, protocol),))]
    return plan_service(service, slices, context)


def sockets(*numbers: int) -> tuple[str, ...]:
    return tuple(f"10.244.0.{each}:8080" for each in numbers)


def test_listeners_of_plans() -> None:
    assert localhost_listeners(plans([1, 2])) == (LocalhostListener(30080, sockets(1, 2)),)
    assert localhost_listeners(plans([1], affinity_seconds=60)) == (LocalhostListener(30080, sockets(1), 60),)
    assert localhost_listeners(plans([])) == ()
    assert localhost_listeners(plans([1], node_port=0)) == ()
    assert localhost_listeners(plans([1], protocol="UDP")) == ()
    local = plans([1, 2], here=[2], external_local=True)
    assert localhost_listeners(local) == (LocalhostListener(30080, sockets(2)),)
    assert localhost_listeners(plans([1, 2], external_local=True)) == ()


@pytest.mark.parametrize(
    ("traffic", "protocol", "numbers", "chain"),
    [
        ("", "TCP", [1], ""),
        ("reject", "TCP", [1], names.LOCALHOST_REJECT),
        ("reject", "TCP", [], names.LOCALHOST_REJECT),
        ("reject", "UDP", [1], names.LOCALHOST_REJECT),
        ("proxy", "TCP", [1], names.LOCALHOST_PROXY),
        ("proxy", "SCTP", [1], names.LOCALHOST_REJECT),
        ("proxy-hold", "TCP", [1], names.LOCALHOST_PROXY),
        ("proxy-hold", "TCP", [], ""),
        ("proxy-hold", "UDP", [1], names.LOCALHOST_REJECT),
    ],
)
def test_verdict_on_loopback(traffic: LocalhostTraffic, protocol: Protocol, numbers: list[int], chain: str) -> None:
    context = replace(CONTEXT, localhost_traffic=traffic)
    found = plans(numbers, context=context, protocol=protocol)
    rendered = render_service(found, context)
    assert rendered is not None
    verdicts = dict(rendered.frontends[-1].verdicts)
    assert verdicts.get(names.LOCALHOST_NODE_PORTS, "") == chain
    plain = render_service(found, replace(context, localhost_traffic=""))
    assert plain is not None
    assert plain.frontends[:-1] == rendered.frontends[:-1]
    served = "127.0.0.1" if traffic.startswith("proxy") and protocol == "TCP" and numbers else ""
    assert proxied_address(context, found[0]) == served


def table(traffic: LocalhostTraffic) -> str:
    """Return a table with a NodePort for TCP and one for UDP, as nft lists it."""
    context = replace(CONTEXT, localhost_traffic=traffic)
    diff = NftablesDiff(NftablesLedger(), context, create=True)
    diff.put("ns/web", render_service(plans([1], context=context), context))
    diff.put("ns/dns", render_service(plans([1], context=context, name="dns", protocol="UDP"), context))
    change = diff.last_transaction()
    return NftWriter(V4).table(change.added_sets, change.all_added_elements(), change.added_rules)


@pytest.mark.parametrize(
    ("traffic", "tcp", "udp", "from_outside"),
    [
        ("", "accepted", "accepted", "accepted"),
        ("reject", "rejected", "rejected", "rejected"),
        ("proxy", "accepted", "rejected", "dropped"),
        ("proxy-hold", "accepted", "rejected", "dropped"),
    ],
)
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_simulator_and_trace_know_the_chains(
    traffic: LocalhostTraffic, address: str, tcp: str, udp: str, from_outside: str
) -> None:
    text = table(traffic)
    simulator = NftablesSimulator(text, V4)
    expected: dict[Protocol, str] = {"TCP": tcp, "UDP": udp}
    for protocol, verdict in expected.items():
        packet = Packet(protocol=protocol, source="127.0.0.1", destination=address, port=30080)
        assert simulator.send(packet).only.verdict.value == verdict
        found = ask(text, source="127.0.0.1", to=address, port=30080, protocol=protocol, interface="")
        assert ([each.verdict for each in found.outcomes], found.unknown_probability) == ([verdict], 0)
    neighbor = Packet(protocol="TCP", source="10.1.0.5", destination=address, port=30080, interface="eth0")
    assert simulator.send(neighbor).only.verdict.value == from_outside


# The choice of endpoints


def first(items: Sequence[str]) -> str:
    return items[0]


def test_each_connection_is_drawn_anew() -> None:
    numbers = count()
    choice = EndpointChoice(LocalhostListener(1, sockets(1, 2, 3)), lambda items: items[next(numbers) % len(items)])
    assert [choice.choose((), 0) for _ in range(4)] == [*sockets(1, 2, 3, 1)]


def test_other_endpoints_are_tried_after_failures() -> None:
    choice = EndpointChoice(LocalhostListener(1, sockets(1, 2, 3, 4)), first)
    tried: list[str] = []
    while chosen := choice.choose(tried, 0):
        tried.append(chosen)
    assert tried == [*sockets(1, 2, 3)]
    assert EndpointChoice(LocalhostListener(1, sockets(1)), first).choose(sockets(1), 0) == ""


def last(items: Sequence[str]) -> str:
    return items[-1]


class TestAffinity:
    """One endpoint for all connections, until the timeout has passed without a connection."""

    listener = LocalhostListener(1, sockets(1, 2, 3), 60)

    def choice(self) -> EndpointChoice:
        draws = iter((first, last, first, last))

        def draw(items: Sequence[str]) -> str:
            return next(draws)(items)

        found = EndpointChoice(self.listener, draw)
        assert found.choose((), 0) == sockets(1)[0]
        return found

    def test_timeout_starts_over_with_each_connection(self) -> None:
        choice = self.choice()
        assert [choice.choose((), now) for now in (60, 120, 180)] == [*sockets(1, 1, 1)]
        assert choice.choose((), 240.1) == sockets(3)[0]

    def test_endpoint_that_left_is_forgotten(self) -> None:
        choice = self.choice()
        choice.update(replace(self.listener, endpoints=sockets(2, 3)))
        assert choice.choose((), 1) == sockets(3)[0]

    def test_other_endpoints_do_not_matter(self) -> None:
        choice = self.choice()
        choice.update(replace(self.listener, endpoints=sockets(1, 7)))
        assert choice.choose((), 1) == sockets(1)[0]

    def test_endpoint_is_forgotten_if_the_timeout_changes(self) -> None:
        choice = self.choice()
        choice.update(replace(self.listener, affinity_seconds=90))
        assert choice.choose((), 1) == sockets(3)[0]

    def test_unreachable_endpoint_is_replaced(self) -> None:
        choice = self.choice()
        assert choice.choose(sockets(1), 1) == sockets(3)[0]
        assert choice.choose((), 2) == sockets(3)[0]


# The order of listeners and rules


class FakePlans:
    def __init__(self, found: Mapping[ServiceKey, Sequence[ServicePortPlan]]) -> None:
        self._found = found

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        yield from self._found.items()

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        return self._found[key]


class Recorder:
    """A backend and its listeners. Records what happens in `events`."""

    needs_full_sync = False

    def __init__(self) -> None:
        self.events: list[str] = []
        self.fails = False
        self.backend = ListeningBackend(self, V4, self)  # type: ignore[arg-type]

    def sync(self, found: FakePlans, context: Context) -> ApplyResult:
        covered = [key for key, _ in found.by_service()]
        self.events.append(f"commit {' '.join(covered)}")
        if self.fails:
            raise SyncError("rejected")
        return ApplyResult({}, {})

    def set_listener(self, family: Family, wanted: LocalhostListener) -> None:
        assert family is V4
        self.events.append(f"open {wanted.port}: {' '.join(wanted.endpoints)}")

    def remove_listener(self, family: Family, port: int) -> None:
        assert family is V4
        self.events.append(f"close {port}")

    def program(self, **found: Sequence[ServicePortPlan]) -> list[str]:
        """Sync Services by name. Return what happened."""
        self.events.clear()
        try:
            self.backend.sync(FakePlans({f"ns/{name}": each for name, each in found.items()}), CONTEXT)
        except SyncError:
            self.events.append("failed")
        return self.events


def test_listeners_open_before_the_rules_and_close_after_them() -> None:
    recorder = Recorder()
    assert recorder.program(web=plans([1])) == ["open 30080: 10.244.0.1:8080", "commit ns/web"]
    assert recorder.program(web=plans([2])) == ["open 30080: 10.244.0.2:8080", "commit ns/web"]
    assert recorder.program(other=plans([3], name="other", node_port=0)) == ["commit ns/other"]
    assert recorder.program(web=plans([])) == ["commit ns/web", "close 30080"]
    assert recorder.program(web=()) == ["commit ns/web"]


def test_failed_sync_closes_nothing() -> None:
    recorder = Recorder()
    recorder.program(web=plans([1]))
    recorder.fails = True
    assert recorder.program(web=()) == ["commit ns/web", "failed"]
    recorder.fails = False
    assert recorder.program(web=()) == ["commit ns/web", "close 30080"]


def test_listener_stays_open_while_another_service_claims_it() -> None:
    recorder = Recorder()
    recorder.program(a=plans([1], name="a"), b=plans([2], name="b"))
    assert recorder.program(a=()) == ["open 30080: 10.244.0.2:8080", "commit ns/a"]
    assert recorder.program(a=plans([1], name="a")) == ["open 30080: 10.244.0.1:8080", "commit ns/a"]
    assert recorder.program(a=(), b=()) == ["open 30080: 10.244.0.2:8080", "commit ns/a ns/b", "close 30080"]


def test_moved_node_port_stays_open() -> None:
    recorder = Recorder()
    recorder.program(a=plans([1], name="a"))
    moved = recorder.program(a=(), b=plans([2], name="b"))
    assert moved == ["open 30080: 10.244.0.2:8080", "commit ns/a ns/b"]


def test_proxy_is_not_imported_with_the_daemon() -> None:
    code = "import sys, kproxy.app.daemon; print([name for name in sys.modules if 'localhost_' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['kproxy.model.localhost_node_ports', 'kproxy.app.localhost_node_ports']\n"
