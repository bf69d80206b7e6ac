"""Probe whether nftables mode works on this node.

The probe commits one transaction that creates a table, uses every required feature in it, and deletes the table.
"""

from __future__ import annotations

import logging
import os
from functools import cache

from kproxy.host.commands import PROBE_TIMEOUT_SECONDS, InconclusiveError
from kproxy.host.netlink import BatchRejectedError, BatchSocket
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family
from kproxy.nftables.diff import NftablesDiff
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.kernel import NetlinkCommit, NftCommit, TableError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import render_service
from kproxy.nftables.ruleset import Drop, MatchSocket, MatchSyn, NftChain, NftHook, rule
from kproxy.nftables.transaction import Transaction

log = logging.getLogger(__name__)
PROBE_TABLE = "kproxy-probe"
# TEST-NET-1 (RFC 5737) and the IPv6 documentation prefix (RFC 3849)
_ADDRESSES = {
    Family.IPV4: ("192.0.2.1", "192.0.2.2:1", "192.0.2.0/24"),
    Family.IPV6: ("2001:db8::1", "[2001:db8::2]:1", "2001:db8::/32"),
}


class NftablesUnsupportedError(Exception):
    """nftables mode does not work on this node. The message gives the reason on one line."""


def choose_commit(family: Family) -> NetlinkCommit | NftCommit:
    """Return a `Commit` that works on this node: one that uses netlink or, as a fallback, one that runs `nft`.

    Raises `NftablesUnsupportedError` if neither works for the family. Raises `InconclusiveError` if netlink does not
    work and the probe with `nft` gives no result, because `nft` was killed or could not be started for a reason that
    may be temporary.
    """
    try:
        NetlinkCommit(family, PROBE_TABLE)(probe_transaction(family))
    except TableError as error:
        netlink_error = error
    else:
        return NetlinkCommit(family)
    try:
        NftCommit(family, PROBE_TABLE, timeout=PROBE_TIMEOUT_SECONDS)(probe_transaction(family))
    except TableError as error:
        if error.inconclusive:
            raise InconclusiveError(
                f"cannot determine whether the kernel supports nftables mode: {netlink_error}; {error}"
            ) from None
        release = os.uname().release
        raise NftablesUnsupportedError(
            f"Linux {release} rejected the table over netlink: {netlink_error}; with nft: {error}; "
            "nftables mode needs Linux 5.13 or later with nf_tables, and the capability CAP_NET_ADMIN"
        ) from None
    log.warning(
        "%s: falling back to the program nft, which is slower, because netlink failed: %s", family.value, netlink_error
    )
    return NftCommit(family)


def unsupported_reason(family: Family, *, connection_counters: bool = False) -> str:
    """Return why the kernel rejects the objects of nftables mode, or "" if it accepts them. Changes nothing.

    The batch is the one of `choose_commit`, but the kernel only checks it: other programs get no notification, and the
    generation ID stays the same. See `probe_transaction` for `connection_counters`. Raises `OSError`.
    """
    return _rejection(family, probe_transaction(family, connection_counters=connection_counters))


@cache
def matches_sockets(family: Family) -> bool:
    """Return whether rules can match packets for which a socket exists (nft_socket). Changes nothing."""
    rules = (rule(MatchSyn(), MatchSocket(transparent=False), Drop()),)
    chain = NftChain("sockets", rules, hook=NftHook("filter", "input", 0))
    transaction = Transaction(create_table=True, added_chains=[chain], added_rules=[chain], delete_table=True)
    try:
        reason = _rejection(family, transaction)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        log.info(
            "%s: NodePorts on loopback addresses refuse connections while kproxy restarts: %s", family.value, reason
        )
    return not reason


def _rejection(family: Family, transaction: Transaction) -> str:
    """Return why the kernel rejects a transaction, or "" if it would accept it. Changes nothing. Raises `OSError`."""
    messages = list(TransactionEncoder(family, PROBE_TABLE).encode(transaction))
    with BatchSocket(NFNL_SUBSYS_NFTABLES) as netlink:
        try:
            netlink.check([(each.type, each.flags, each.payload) for each in messages])
        except BatchRejectedError as error:
            first = error.rejections[0]
            return f"{messages[first.index].subject}: {first.reason}" if first.index >= 0 else first.reason
    return ""


def why_no_counters(family: Family, commit: NetlinkCommit | NftCommit) -> str:
    """Return why the kernel rejects counters in the elements of maps, or "" if it accepts them.

    `commit` is the result of `choose_commit`.
    """
    try:
        if isinstance(commit, NetlinkCommit):
            return unsupported_reason(family, connection_counters=True)
        NftCommit(family, PROBE_TABLE, timeout=PROBE_TIMEOUT_SECONDS)(
            probe_transaction(family, connection_counters=True)
        )
    except OSError as error:
        return error.strerror or str(error)
    except TableError as error:
        return str(error)
    return ""


def probe_transaction(family: Family, *, connection_counters: bool = False) -> Transaction:
    """Return a transaction that uses every feature that nftables mode needs. At the end, it deletes its table.

    With `connection_counters`, it also uses what `Context.connection_counters` needs.
    """
    address, endpoint, network = _ADDRESSES[family]
    context = Context(
        family,
        "",
        local_traffic=LocalTraffic(cidr=network),
        service_cidrs=(network,),
        connection_counters=connection_counters,
        localhost_traffic="reject",
    )
    diff = NftablesDiff(NftablesLedger(), context, create=True)
    for port in (1, 2):
        plan = _plan(address, endpoint, port=port, affinity_seconds=port - 1)
        diff.put(plan.service, render_service([plan], context))
    transaction = diff.last_transaction()
    transaction.replace_table = False
    transaction.delete_table = True
    return transaction


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
        endpoints_on_node=(endpoint,),
    )
