"""Many pods in one namespace per node: for tests in which what matters is their number, not their inside."""

from __future__ import annotations

from collections.abc import Sequence

from tests.lab.client import Failed
from tests.lab.links import version_of
from tests.lab.topology import Host, Lab

VANISHED = Failed("[Errno 113] No route to host")
"""How a connection to a pod fails that has vanished, and no other in the lab."""

_REJECT = {4: ("iptables", "icmp-host-unreachable"), 6: ("ip6tables", "icmp6-addr-unreachable")}


class Machine:
    """Where all pods of one node live."""

    def __init__(self, lab: Lab, node: str, addresses: Sequence[str]) -> None:
        """Add a namespace that has these addresses, to be shared out among pods."""
        self._namespace = lab.add_pod(f"pods-{node}", *addresses, node=node).namespace

    def pod(self, name: str, *addresses: str) -> Host:
        """Return one pod: some of the machine's addresses under a name."""
        return Host(name, self._namespace, addresses)


def vanish(pod: Host) -> None:
    """Make a pod unreachable from one moment to the next: "host unreachable" is the answer to new connections.

    It comes from behind the node, so that the node's connection tracking keeps every attempt with this pod. What is
    connected already ends in peace: nobody would tell its client that it waits in vain.
    """
    for address in pod.addresses:
        program, answer = _REJECT[version_of(address)]
        to_pod = ["-d", address, "-p", "tcp", "--syn"]
        pod.namespace.run([program, "-w", "-I", "INPUT", *to_pod, "-j", "REJECT", "--reject-with", answer])
