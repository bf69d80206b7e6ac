"""Facts about a sound node, for tests of `kproxy doctor`."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from kproxy.config.conntrack_sysctls import HASH_SIZE
from kproxy.diagnose import paths
from kproxy.diagnose.facts import (
    ApiFacts,
    HostFacts,
    IptablesProgram,
    NodeObject,
    ProcessFacts,
    ProxyChains,
    RuleFacts,
    Settings,
)
from kproxy.host.observed import BaseChain, Link, ListeningSocket, ObservedProcess
from kproxy.model.types import Family

LISTEN = {"healthzBindAddress": "0.0.0.0:10256", "metricsBindAddress": "127.0.0.1:10249"}
SETTINGS = Settings(
    mode="nftables", node_name="node-1", host_name="node-1", listen=LISTEN, cluster_cidrs=("10.244.0.0/16",)
)
NODE = NodeObject(name="node-1", addresses=("192.0.2.11",), pod_cidrs=("10.244.1.0/24",))
API = ApiFacts(
    source="/etc/kproxy/kubeconfig",
    server="https://192.0.2.1:6443",
    host="192.0.2.1",
    answered=True,
    clock_offset=0.4,
    node=NODE,
    kubernetes_ips=("10.96.0.1",),
)
ETH0 = Link(2, "eth0", 1500)
CNI0 = Link(3, "cni0", 1450, "bridge")
POD = Link(4, "veth1", 1450, "veth", master=3)
TUNNEL = Link(5, "flannel.1", 1450, "vxlan")
LINKS = (Link(1, "lo", 65536, loopback=True), ETH0, CNI0, POD, TUNNEL)
PARAMETERS = {
    paths.IP_FORWARD: 1,
    paths.IPV6_FORWARDING: 1,
    paths.BRIDGE_IPTABLES: 1,
    paths.BRIDGE_IP6TABLES: 1,
    paths.ROUTE_LOCALNET: 0,
    paths.CONNTRACK_MAX: 131072,
    paths.CONNTRACK_COUNT: 900,
    HASH_SIZE: 32768,
    paths.reverse_path("all"): 2,
}
SOUND = HostFacts(
    settings=SETTINGS,
    kernel="6.1.0-18-amd64",
    support={Family.IPV4: "", Family.IPV6: ""},
    iptables=IptablesProgram(number=(1, 8, 9)),
    nft_version="nftables v1.0.6 (Lester Gooch #5)",
    parameters=PARAMETERS,
    links=LINKS,
    addresses={1: frozenset(["127.0.0.1"]), 2: frozenset(["192.0.2.11", "fe80::1"])},
    default_interfaces=("eth0",),
    rules=RuleFacts(variants=frozenset(["nft"]), kubelet=frozenset(["nft"])),
    open_files=65536,
    api=API,
)


def settings(**changes: Any) -> HostFacts:
    return replace(SOUND, settings=replace(SETTINGS, **changes))


def parameters(facts: HostFacts = SOUND, /, **changes: int | None) -> HostFacts:
    """Return the facts with other parameters, named as the constants of `kproxy.diagnose.paths`. None removes one."""
    named = {getattr(paths, name): value for name, value in changes.items()}
    return replace(facts, parameters={path: value for path, value in (PARAMETERS | named).items() if value is not None})


def rules(facts: HostFacts = SOUND, /, **changes: Any) -> HostFacts:
    return replace(facts, rules=replace(facts.rules, **changes))


def processes(**changes: Any) -> HostFacts:
    return replace(SOUND, processes=ProcessFacts(**changes))


def proxy(*argv: str) -> HostFacts:
    """Return the facts with one other proxy, given by its command line."""
    return processes(proxies=(process(*argv),))


def process(*argv: str) -> ObservedProcess:
    return ObservedProcess(4711, argv[0].rpartition("/")[2][:15], argv, same_network=True)


def api(**changes: Any) -> HostFacts:
    return replace(SOUND, api=replace(API, **changes))


def links(*changed: Link) -> HostFacts:
    """Return the facts with other interfaces, which replace those with the same index."""
    found = {link.index: link for link in (*LINKS, *changed)}
    return replace(SOUND, links=tuple(found.values()))


def chain(hook: str = "forward", *, table: str = "filter", jumps: tuple[str, ...] = (), **changes: Any) -> HostFacts:
    """Return the facts with a base chain of another program, whose policy is `drop`."""
    fields: dict[str, Any] = {"policy": "drop", "accepts": True, "jumps": jumps} | changes
    return rules(base_chains=(BaseChain("ip", table, hook.upper(), hook, 0, **fields),))


def iptables(number: tuple[int, ...] = (1, 8, 9), **changes: Any) -> HostFacts:
    """Return the facts of a sound node in iptables mode, with another iptables."""
    return replace(settings(mode="iptables"), iptables=IptablesProgram(number=number, **changes))


def services(*places: str, own: bool = False) -> tuple[ProxyChains, ...]:
    return tuple(ProxyChains(place, 12, own) for place in places)  # type: ignore[arg-type]


def listening(address: str, port: int, *, pid: int = 0, own: tuple[int, ...] = ()) -> HostFacts:
    holders = {port: ("nginx", pid)} if pid else {}
    return processes(sockets=(ListeningSocket(address, port),), holders=holders, own=own)
