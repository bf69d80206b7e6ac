"""Pods that share one namespace per node, for tests that need many of them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.lab.client import Failed
from tests.lab.links import version_of
from tests.lab.topology import Host, Lab

UNREACHABLE = Failed("[Errno 113] No route to host")
"""The outcome of connecting to a pod after `make_unreachable`. No other host of the lab answers so."""

_REJECT = {4: ("iptables", "icmp-host-unreachable"), 6: ("ip6tables", "icmp6-addr-unreachable")}


class NodePods:
    """The namespace that all pods of one node share."""

    def __init__(self, lab: Lab, node: str, addresses: Sequence[str]) -> None:
        """Add a namespace with these addresses."""
        self._namespace = lab.add_pod(f"pods-{node}", *addresses, node=node).namespace

    def pod(self, name: str, *addresses: str) -> Host:
        """Return a pod: some of the addresses, under a name."""
        return Host(name, self._namespace, addresses)


def make_unreachable(pod: Host) -> None:
    """Answer new connections to a pod with ICMP "host unreachable" from now on.

    The answer comes from beyond the node, so the node's connection tracking keeps each attempt assigned to this pod.
    Established connections are left alone: their clients would get no error and wait until they time out.
    """
    for address in pod.addresses:
        program, answer = _REJECT[version_of(address)]
        to_pod = ["-d", address, "-p", "tcp", "--syn"]
        pod.namespace.run([program, "-w", "-I", "INPUT", *to_pod, "-j", "REJECT", "--reject-with", answer])
