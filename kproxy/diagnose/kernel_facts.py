"""Read what the kernel has for a Service: its rules and its tracked connections. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NoReturn

from msgspec.structs import replace

from kproxy.diagnose.explain_facts import Facts, KernelFacts, RulesComparison, TrackedFlow
from kproxy.diagnose.explain_report import ExplainSource
from kproxy.diagnose.iptables_check import compare_iptables
from kproxy.diagnose.nftables_check import compare_nftables
from kproxy.diagnose.port_case import PortCase, cases_of, claimed_frontends, known_endpoints
from kproxy.host.commands import CommandError
from kproxy.host.ctnetlink import MAX_FILTERED_DUMPS, read_flows
from kproxy.host.interfaces import own_addresses
from kproxy.host.process import has_net_admin
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.addresses import family_of, split_socket_text
from kproxy.model.stale_udp_flows import UdpFrontends, accepts_node_ports
from kproxy.model.types import Family, Protocol
from kproxy.nftables.elements import PROTOCOLS
from kproxy.nftables.kernel import NftTable, TableError
from kproxy.nftables.transaction import Transaction


def with_kernel(facts: Facts, *, whole: bool) -> Facts:
    """Return the facts with those of the kernel in this network namespace. `whole` is as in `compare_nftables`."""
    service = facts.service
    if service is None:
        return facts
    if not has_net_admin():
        detail = "needs root (CAP_NET_ADMIN): the rules and tracked connections were not compared"
        return _with_source(facts, "kernel", detail)
    cases = list(cases_of(facts, service))
    try:
        kernel = _compare(facts, cases, whole=whole)
    except (TableError, CommandError) as error:
        facts = _with_source(facts, "kernel", str(error))
    else:
        facts = _with_source(replace(facts, kernel=kernel), "kernel", kernel.summary, used=True)
        cases = list(cases_of(facts, service))
    try:
        flows = tuple(_flows(facts, cases))
    except OSError as error:
        return _with_source(facts, "conntrack", f"cannot be read: {error.strerror or error}")
    return _with_source(
        replace(facts, flows=flows), "conntrack", f"{sum(each.count for each in flows)} flows", used=True
    )


def _with_source(facts: Facts, name: str, detail: str, *, used: bool = False) -> Facts:
    source = ExplainSource(name=name, used=used, detail=detail)  # type: ignore[arg-type]  # always valid literals
    return replace(facts, sources=(*facts.sources, source))


# Rules


def _compare(facts: Facts, cases: Sequence[PortCase], *, whole: bool) -> KernelFacts:
    lost = {conflict.frontend for case in cases for conflict in case.lost}
    found = _compare_families(facts, lost, whole=whole)
    if facts.objects is None or not facts.objects.sees_all_services:
        # Frontends may belong to Services that could not be seen. Then their rules are no drift.
        unseen = found.owners.keys() - lost
        return replace(_compare_families(facts, lost | unseen, whole=whole), owners=found.owners) if unseen else found
    return found


def _compare_families(facts: Facts, lost: Collection[str], *, whole: bool) -> KernelFacts:
    found = {
        family: _comparison(facts.mode, family)(plans, facts.context(family), lost=lost, whole=whole)
        for family, plans in facts.plans().items()
        if _serves(facts, family)
    }
    present = [each for each in found.values() if each is not None]
    return KernelFacts(
        compared=tuple(found),
        absent=tuple(family for family, each in found.items() if each is None),
        differences=tuple(difference for each in present for difference in each.differences),
        summary="; ".join(dict.fromkeys(each.summary for each in present if each.summary)),
        owners={frontend: owner for each in present for frontend, owner in each.owners.items()},
    )


def _serves(facts: Facts, family: Family) -> bool:
    """Return whether kproxy programs a family on this node. Without a daemon, a node has the families of its Node."""
    if facts.daemon is not None:
        return family in facts.daemon.families
    addresses = facts.node.addresses if facts.node is not None else ()
    return not addresses or any(family_of(address) is family for address in addresses)


def _comparison(mode: str, family: Family) -> Callable[..., RulesComparison | None]:
    if mode == "nftables":
        return partial(compare_nftables, NftTable(family, _refuse))
    return partial(compare_iptables, IptablesRunner(family))


def _refuse(transaction: Transaction, generation: int | None = None, /) -> NoReturn:  # noqa: ARG001
    raise TableError("this command changes nothing")


# Tracked connections


def _flows(facts: Facts, cases: Sequence[PortCase]) -> Iterator[TrackedFlow]:
    """Yield the tracked connections to the frontends of the Service that belong to it."""
    ports: dict[tuple[Family, Protocol], set[int]] = {}
    for case in cases:
        for family in case.plans:
            ports.setdefault((family, case.port.protocol), set()).update({case.port.port, case.port.node_port} - {0})
    tracked = {key: _count_flows(*key, wanted) for key, wanted in ports.items()}
    for case in cases:
        for family in case.plans:
            yield from _flows_of_port(facts, case, family, tracked[family, case.port.protocol])


def _count_flows(family: Family, protocol: Protocol, ports: Collection[int]) -> dict[int, Counter[tuple[str, str]]]:
    """Return the number of tracked connections by destination port, and by destination and reply source."""
    found: dict[int, Counter[tuple[str, str]]] = {port: Counter() for port in ports}
    for only_port in ports if len(ports) <= MAX_FILTERED_DUMPS else (0,):
        for flow in read_flows(family, PROTOCOLS[protocol], only_port):
            if (port := split_socket_text(flow[0])[1]) in found:
                found[port][flow] += 1
    return found


def _flows_of_port(
    facts: Facts, case: PortCase, family: Family, tracked: Mapping[int, Counter[tuple[str, str]]]
) -> Iterator[TrackedFlow]:
    plan, context = case.plans[family], facts.context(family)
    lost = {conflict.frontend for conflict in case.lost}
    frontends = {_short(name) for name, _ in claimed_frontends(plan) if name not in lost}
    known = known_endpoints(facts, case, family)
    own = cache(lambda: own_addresses(family))
    accepts = cache(lambda address: accepts_node_ports(context, address, own))
    udp = UdpFrontends()
    udp.update({facts.key: (plan,)}, complete=True)
    for port in dict.fromkeys((plan.port, plan.node_port)):
        for (destination, source), count in sorted(tracked.get(port, Counter()).items()):
            if destination in frontends:
                frontend = destination
            elif f":{port}" in frontends and accepts(split_socket_text(destination)[0]):
                frontend = f":{port}"
            else:
                continue
            is_udp = plan.protocol == "UDP"
            stale = udp.is_stale(destination, source, accepts) if is_udp else source not in known
            yield TrackedFlow(family, plan.protocol, frontend, source, count, stale)


def _short(frontend: str) -> str:
    """Return a frontend's name without its protocol: `IP:port`, or `:port` for a NodePort."""
    return frontend.rpartition("/")[0].replace("NodePort ", ":")
