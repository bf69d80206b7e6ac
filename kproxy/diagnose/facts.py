"""The facts about a node that `kproxy doctor` judges. Pure.

A fact that could not be determined is None, or is absent from its collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct, field

from kproxy.config.types import LocalMode, Mode
from kproxy.host.observed import BaseChain, Link, ListeningSocket, ObservedProcess
from kproxy.model.types import Family

IptablesVariant: TypeAlias = Literal["nft", "legacy"]


class IptablesProgram(Struct, frozen=True, kw_only=True):
    """The installed iptables. `problem` is why it cannot be used, or ""."""

    number: tuple[int, ...] = ()
    variant: IptablesVariant = "nft"
    problem: str = ""

    def __str__(self) -> str:
        return f"iptables {'.'.join(map(str, self.number))} ({'nf_tables' if self.variant == 'nft' else 'legacy'})"


class Settings(Struct, frozen=True, kw_only=True):
    """What the configuration says.

    `mode` is the mode that kproxy uses on this node; `mode_is_set` is false if that is only the default. `listen` maps
    the configuration's fields with listen addresses to these addresses, as `IP:port`. `localhost_node_ports` is true if
    NodePorts must answer on 127.0.0.1. `conntrack` are the kernel parameters that kproxy would change, with their new
    values. `ipv6` is true if the configuration names IPv6 CIDRs. `local_mode`, `cluster_cidrs`, `pod_bridge` and
    `pod_prefix` say how kproxy recognizes traffic from local pods.
    """

    mode: Mode
    mode_is_set: bool = True
    node_name: str = ""
    host_name: str = ""
    name_is_overridden: bool = False
    listen: Mapping[str, str] = {}
    localhost_node_ports: bool = False
    conntrack: Mapping[str, int] = {}
    ipv6: bool = False
    local_mode: LocalMode = "ClusterCIDR"
    cluster_cidrs: tuple[str, ...] = ()
    pod_bridge: str = ""
    pod_prefix: str = ""


class ProxyChains(Struct, frozen=True):
    """Chains of a service proxy in one place: `nft` or `legacy` for iptables rules, `table` for kube-proxy's own table.

    `number` is the number of chains whose names begin with KUBE-, or of all chains of the table. `own` is
    true for a table that has the maps of kproxy, which kube-proxy's does not have.
    """

    place: Literal["nft", "legacy", "table"]
    number: int
    own: bool = False


class RuleFacts(Struct, frozen=True, kw_only=True):
    """The rules of all programs.

    `variants` are the iptables variants that have any rule or chain of their own. `kubelet` are the variants that have
    the kubelet's chains. `unreadable` is why some rules could not be read, or "". `ipvs_interface` and `ipsets` are
    left by ipvs mode.
    """

    base_chains: tuple[BaseChain, ...] = ()
    proxies: tuple[ProxyChains, ...] = ()
    variants: frozenset[IptablesVariant] = frozenset()
    kubelet: frozenset[IptablesVariant] = frozenset()
    unreadable: str = ""
    ipvs_interface: bool = False
    ipsets: int = 0


class NodeObject(Struct, frozen=True, kw_only=True):
    """What matters of a Node in the API: its name, its internal addresses, and its pod CIDRs."""

    name: str
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()


class ApiFacts(Struct, frozen=True, kw_only=True):
    """What a few requests to the API server showed.

    `source` is the kubeconfig's path, or says that the Pod's service account is used; it is "" if kproxy has no
    configuration for an API server. `server` is its URL, or "" if the configuration is invalid; `host` may be known
    even then. `problem` is why no request was answered, or "". `slow` is true if an answer may still come.

    `clock_offset` is the local time minus the server's, in seconds. `denied` are the requests that were answered with
    401 or 403, with the status; `failed` are those with another status than 200. `node` is the Node with this machine's
    name. None with `node_missing` means that there is none, and `similar` are then the Nodes that have an address of
    this machine. `kubernetes_ips` are the ClusterIPs of the Service `default/kubernetes`.
    """

    source: str = ""
    in_cluster: bool = False
    server: str = ""
    host: str = ""
    problem: str = ""
    answered: bool = False
    slow: bool = False
    clock_offset: float | None = None
    denied: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    node: NodeObject | None = None
    node_missing: bool = False
    similar: tuple[str, ...] = ()
    kubernetes_ips: tuple[str, ...] = ()


class ProcessFacts(Struct, frozen=True, kw_only=True):
    """Processes in this network namespace that may proxy Services, and who uses the configured ports.

    `own` are the PIDs of running kproxy daemons, `proxies` are other programs. `cilium_replaces` tells whether Cilium
    replaces kube-proxy. `sockets` listen on a port of `Settings.listen`; `holders` are the names and PIDs of the
    processes behind them, as far as they are known, by port. `all_visible` is false in a container that sees only its
    own processes.
    """

    own: tuple[int, ...] = ()
    proxies: tuple[ObservedProcess, ...] = ()
    cilium_replaces: bool | None = None
    sockets: tuple[ListeningSocket, ...] = ()
    holders: Mapping[int, tuple[str, int]] = {}
    all_visible: bool = True


class HostFacts(Struct, frozen=True, kw_only=True):
    """Everything that `findings` judges.

    `support` maps each IP family to why the kernel rejects the rules of the mode, or to ""; without privileges it is
    empty. `parameters` are numeric kernel parameters by path relative to `/` (`kproxy.diagnose.paths`); `writable` are
    those that this process may change. `conntrack_drops` is how many packets were dropped because the table was full.
    `addresses` are those of each interface, by its index. `default_interfaces` are those of the default routes.
    `open_files` is the limit of the running kproxy, or else of this process; None means that there is no limit.
    """

    settings: Settings
    kernel: str = ""
    uid: int = 0
    net_admin: bool = True
    net_raw: bool = True
    ipv6_kernel: bool = True
    support: Mapping[Family, str] = {}
    iptables: IptablesProgram | None = None
    nft_version: str = ""
    parameters: Mapping[str, int] = {}
    writable: frozenset[str] = frozenset()
    conntrack_drops: int = 0
    links: tuple[Link, ...] = ()
    addresses: Mapping[int, frozenset[str]] = field(default_factory=dict)
    default_interfaces: tuple[str, ...] = ()
    rules: RuleFacts = RuleFacts()
    processes: ProcessFacts = ProcessFacts()
    open_files: int | None = None
    api: ApiFacts = ApiFacts()
