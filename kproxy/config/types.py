"""The configuration of kube-proxy 1.36: every field of `KubeProxyConfiguration` v1alpha1, with its default. Pure.

Fields are named as in the file, in Python's spelling (`masqueradeBit` is `masquerade_bit`), and mean the same;
those that kproxy has no use for say so. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
PRIMARY = "primary"
"""The only entry of `nodePortAddresses` that is no CIDR: the node's primary address of each family."""
INT32 = 2**31 - 1


class Seconds(float):
    """A duration, which files and flags write as Go does (`1m30s`)."""


class FlushSeconds(Seconds):
    """A duration that files may also give as a number of nanoseconds."""


class Quantity(str):
    """An amount such as `64Ki`, which files may also give as a number."""

    __slots__ = ()


Mode: TypeAlias = Literal["iptables", "nftables"]
ModeSetting: TypeAlias = Literal["iptables", "nftables", ""]
"""A mode, or "" for what this node can do best, which is found out at start."""
LocalMode: TypeAlias = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]
Bit: TypeAlias = Annotated[int, Meta(ge=0, le=31)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=INT32)]
Period: TypeAlias = Annotated[Seconds, Meta(gt=0)]
Pause: TypeAlias = Annotated[Seconds, Meta(ge=0)]


class Section(Struct, frozen=True, kw_only=True, rename="camel"):
    """A part of the configuration."""


class ClientConnection(Section, frozen=True, kw_only=True):
    """How to reach the API server. Whatever the content types say, watches are in protobuf and lists in JSON."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: Count = 10


class IPTables(Section, frozen=True, kw_only=True):
    """What applies in mode iptables."""

    masquerade_bit: Bit = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period: Period = Seconds(30)
    min_sync_period: Pause = Seconds(1)


class NFTables(Section, frozen=True, kw_only=True):
    """What applies in mode nftables."""

    masquerade_bit: Bit = 14
    masquerade_all: bool = False
    sync_period: Period = Seconds(30)
    min_sync_period: Pause = Seconds(1)


class IPVS(Section, frozen=True, kw_only=True):
    """What applied in mode ipvs: without effect."""

    sync_period: Seconds = Seconds(30)
    min_sync_period: Seconds = Seconds(0)
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = field(default=(), name="excludeCIDRs")
    strict_arp: bool = field(default=False, name="strictARP")
    tcp_timeout: Seconds = Seconds(0)
    tcp_fin_timeout: Seconds = Seconds(0)
    udp_timeout: Seconds = Seconds(0)


class Winkernel(Section, frozen=True, kw_only=True):
    """What applies on Windows: without effect."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Section, frozen=True, kw_only=True):
    """The interfaces of pods, for the values of `detectLocalMode` that go by interface."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Section, frozen=True, kw_only=True):
    """Connection tracking limits and timeouts; 0 leaves what the kernel has."""

    max_per_core: Count = 32768
    min: Count = 131072
    tcp_established_timeout: Pause = Seconds(86400)
    tcp_close_wait_timeout: Pause = Seconds(3600)
    tcp_be_liberal: bool = False
    udp_timeout: Pause = Seconds(0)
    udp_stream_timeout: Pause = Seconds(0)


class LogRouting(Section, frozen=True, kw_only=True):
    """Where log lines of one format go: without effect."""

    split_stream: bool = False
    info_buffer_size: Quantity = Quantity("0")


class LogOptions(Section, frozen=True, kw_only=True):
    """The options of each log format: without effect."""

    text: LogRouting = LogRouting()
    json: LogRouting = LogRouting()


class VModule(Section, frozen=True, kw_only=True):
    """The verbosity of the source files whose names match a pattern."""

    file_pattern: str = ""
    verbosity: Count = 0


class Logging(Section, frozen=True, kw_only=True):
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    flush_frequency: FlushSeconds = FlushSeconds(5)
    verbosity: Count = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class KproxySection(Section, frozen=True, kw_only=True):
    """What kube-proxy does not have: section `kproxy`. A kube-proxy refuses a file with it."""

    iptables_dispatch_threshold: Count = 1000


class Config(Section, frozen=True, kw_only=True):
    """A whole configuration.

    IP addresses and CIDRs are in canonical form. `healthz_bind_address` and `metrics_bind_address` are
    `IP:port`, or "" where a flag turned that server off. While `mode` is "", nobody has chosen one yet: what depends
    on it raises `ValueError`, until `resolved` says which it is.
    """

    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"  # noqa: S104 - no socket is bound to it
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: ModeSetting = "iptables"
    iptables: IPTables = IPTables()
    ipvs: IPVS = IPVS()
    nftables: NFTables = NFTables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: LocalMode = "ClusterCIDR"
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = field(default="", name="clusterCIDR")
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: Annotated[int, Meta(ge=-1000, le=1000)] = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period: Period = Seconds(900)
    port_range: str = ""
    windows_run_as_service: bool = False
    kproxy: KproxySection = KproxySection()

    def resolved(self, mode: Mode) -> Config:
        """Return the configuration with the mode that was chosen. Raises `ValueError` if it asks for another one."""
        if self.mode not in {"", mode}:
            raise ValueError(f"mode {mode} was chosen, but {self.mode} is configured")
        return msgspec.structs.replace(self, mode=mode)

    @property
    def effective_mode(self) -> Mode:
        """The mode, where it is configured or has been chosen. Raises `ValueError` where it has not."""
        if not self.mode:
            raise ValueError("no mode has been chosen yet")
        return self.mode

    @property
    def backend(self) -> IPTables | NFTables:
        """The section of the mode in force: masquerading and the periods of syncs."""
        return self.nftables if self.effective_mode == "nftables" else self.iptables

    @property
    def cluster_cidrs(self) -> tuple[str, ...]:
        """The CIDRs of `cluster_cidr`, at most one of each family."""
        return tuple(self.cluster_cidr.split(",")) if self.cluster_cidr else ()

    @property
    def effective_node_port_addresses(self) -> tuple[str, ...]:
        """CIDRs, or `primary`; () means every local address. Unset is `primary` in mode nftables."""
        usual = (PRIMARY,) if self.effective_mode == "nftables" else ()
        return self.node_port_addresses or usual


def node_name(config: Config, hostname: str) -> str:
    """Return the name of this Node: the override, or else the machine's host name, trimmed and lower-cased."""
    return (config.hostname_override.strip() or hostname.strip()).lower()
