"""Derive the connections to each endpoint from the counters of the rules that translate destinations. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from kproxy.iptables.names import NAT_NODEPORTS, NAT_SERVICES, ChainName, is_shard
from kproxy.model.connection_counts import ConnectionCounts, Destination

_RULE = re.compile(r"\[(\d+):\d+\] -A (KUBE-\S+) (.*)")
_COMMENT = re.compile(r'--comment "?([^"\s]+/[^"\s]+)')
_TARGET = re.compile(r"-[jg] KUBE-(?:SVC|SVL|EXT|FW)-([A-Z2-7]{16})$")
_JUMP_TO_ENDPOINT = re.compile(r"-[jg] (KUBE-SEP-\S+)$")
_TRANSLATION = re.compile(r"--to-destination (\S+)")
_LOAD_BALANCER = re.compile(r"KUBE-(?:SVC|SVL)-([A-Z2-7]{16})(?:[-_][0-9a-f]{2})?")


def connection_counts(lines: Iterable[str]) -> ConnectionCounts:
    """Return the counts in the output of `iptables-save -c -t nat`.

    A connection to an endpoint matches the DNAT rule in the endpoint's chain KUBE-SEP-*. The names of a service port's
    chains KUBE-SVC-*, KUBE-SVL-*, KUBE-EXT-* and KUBE-FW-* end in the same hash. The comments of the rules that jump to
    these chains contain the name of the service port. The rules of endpoints have no comments in large clusters.
    """
    service_ports: dict[str, str] = {}  # by hash
    hashes: dict[str, str] = {}  # by endpoint chain
    packets: list[tuple[str, str, int]] = []
    for line in lines:
        if (rule := _RULE.match(line.rstrip())) is None:
            continue
        counted, chain, rest = rule.groups()
        if chain.startswith("KUBE-SEP-"):
            if translation := _TRANSLATION.search(rest):
                packets.append((chain, translation[1], int(counted)))
        elif jump := _JUMP_TO_ENDPOINT.search(rest):
            if owner := _LOAD_BALANCER.fullmatch(chain):
                hashes[jump[1]] = owner[1]
        elif (target := _TARGET.search(rest)) and _is_dispatcher(chain) and (comment := _COMMENT.search(rest)):
            service_ports[target[1]] = comment[1]
    endpoints: Counter[Destination] = Counter()
    for chain, endpoint, count in packets:
        service_port = service_ports.get(hashes.get(chain, ""), "")
        if service_port:
            endpoints[Destination(service_port, endpoint)] += count
    return ConnectionCounts(endpoints=dict(endpoints))


def _is_dispatcher(name: str) -> bool:
    chain = ChainName("nat", name)
    return chain in (NAT_SERVICES, NAT_NODEPORTS) or is_shard(chain)
