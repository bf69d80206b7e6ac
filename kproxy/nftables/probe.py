"""Finding out whether nftables mode works here: by having the kernel take one of everything, and nothing of it stay."""

from __future__ import annotations

import logging
import os

from kproxy.host.commands import PROBE_TIMEOUT_SECONDS, InconclusiveError
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family
from kproxy.nftables.diff import NftablesDiff
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, TableError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import render_service
from kproxy.nftables.transaction import Transaction

log = logging.getLogger(__name__)
TABLE = "kproxy-probe"


class NftablesUnsupportedError(Exception):
    """nftables mode does not work here; the message says why on one line."""


def choose_commit(family: Family) -> Commit:
    """Return the way by which this kernel takes transactions: netlink or, if it must be, the program `nft`.

    Raises `NftablesUnsupportedError`, or `InconclusiveError` if that cannot be told.
    """
    try:
        NetlinkCommit(family, TABLE)(probe(family))
    except TableError as error:
        refused = error
    else:
        return NetlinkCommit(family)
    try:
        NftCommit(family, TABLE, timeout=PROBE_TIMEOUT_SECONDS)(probe(family))
    except TableError as error:
        if error.undecided:
            raise InconclusiveError(f"cannot tell whether the kernel takes the table: {refused}; {error}") from None
        release = os.uname().release
        raise NftablesUnsupportedError(
            f"Linux {release} does not take the table: {refused}; by nft: {error}; "
            "nftables mode needs Linux 5.13 or later with nf_tables, and the privilege CAP_NET_ADMIN"
        ) from None
    log.warning("%s: changes go by the program nft, which is slower, because by netlink: %s", family.value, refused)
    return NftCommit(family)


def probe(family: Family) -> Transaction:
    """Return a transaction that needs everything nftables mode needs, and that leaves no table behind."""
    six = family is Family.IPV6
    address, endpoint, network = ("2001:db8::1", "[2001:db8::2]:1", "2001:db8::/32") if six else _IPV4
    context = Context(family, "", local_traffic=LocalTraffic(cidr=network), service_cidrs=(network,))
    change = NftablesDiff(NftablesLedger(), context, create=True)
    for port in (1, 2):
        plan = _plan(address, endpoint, port=port, affinity_seconds=port - 1)
        change.put(plan.service, render_service([plan], context))
    made = change.finish()
    made.replace = False
    made.drop = True
    return made


_IPV4 = ("192.0.2.1", "192.0.2.2:1", "192.0.2.0/24")  # TEST-NET-1 (RFC 5737)


def _plan(address: str, endpoint: str, *, port: int, affinity_seconds: int) -> ServicePortPlan:
    return ServicePortPlan(
        service=f"kproxy/probe-{port}",
        port_name="",
        protocol="TCP",
        cluster_ip=address,
        port=port,
        node_port=port,
        external_ips=(),
        vips=(),
        source_ranges=(),
        vips_are_sources=False,
        health_check_node_port=0,
        affinity_seconds=affinity_seconds,
        internal_local=False,
        external_local=True,
        internal=TrafficDecision.FORWARD,
        external=TrafficDecision.FORWARD,
        cluster_endpoints=(endpoint,),
        local_endpoints=(endpoint,),
        known_endpoints=1,
        endpoints_here=(endpoint,),
    )
