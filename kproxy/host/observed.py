"""Values that describe this machine: network interfaces, base chains, processes, listening sockets. Pure."""

from __future__ import annotations

from msgspec import Struct


class Link(Struct, frozen=True):
    """A network interface.

    `kind` is the kernel's name for its type, such as `bridge` or `vxlan`, or "" for a physical interface. `master` is
    the index of the bridge or bond that it belongs to, or 0.
    """

    index: int
    name: str
    mtu: int
    kind: str = ""
    master: int = 0
    up: bool = True
    loopback: bool = False


class BaseChain(Struct, frozen=True):
    """A chain that the kernel evaluates at a hook, and what happens to packets that reach its end.

    `family` is `ip`, `ip6` or `inet`; `hook` is `input`, for example. `policy` is `accept` or `drop`. `final` is the
    verdict of the first rule without a condition that ends the evaluation (`accept`, `drop` or `reject`), or "" if
    there is no such rule. `accepts` is true if an earlier rule may accept packets. `jumps` are the chains to which the
    rules before the final one jump. `legacy` is true for a chain of iptables-legacy.
    """

    family: str
    table: str
    name: str
    hook: str
    priority: int
    policy: str = "accept"
    final: str = ""
    accepts: bool = False
    jumps: tuple[str, ...] = ()
    legacy: bool = False

    @property
    def drops_rest(self) -> bool:
        """Whether the chain drops or rejects all packets that none of its rules accepts."""
        return self.final in {"drop", "reject"} or (not self.final and self.policy == "drop")


class ObservedProcess(Struct, frozen=True):
    """A process. `same_network` tells whether it is in the network namespace of the observer, or None if unknown."""

    pid: int
    name: str
    argv: tuple[str, ...] = ()
    same_network: bool | None = None


class ListeningSocket(Struct, frozen=True):
    """A TCP socket that listens. `address` is an IP address. `inode` identifies the socket in /proc/PID/fd."""

    address: str
    port: int
    inode: int = 0
