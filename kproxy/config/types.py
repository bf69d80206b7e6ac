"""The configuration of kube-proxy 1.38: every field of `KubeProxyConfiguration` v1alpha1, with its default. Pure.

Fields have the same meaning as in the configuration file. Names are in snake case: `masqueradeBit` is `masquerade_bit`.
The docstrings note which fields have no effect in kproxy. Durations are in seconds. The section `kproxy` contains
fields that kube-proxy does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
PRIMARY = "primary"
"""The keyword of `nodePortAddresses` for the Node's primary address of each IP family."""
NODE_PORT_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    PRIMARY: (),
    "localhost": ("127.0.0.0/8", "::1/128"),
    "all": ("0.0.0.0/0", "::/0"),
}
"""The keywords of `nodePortAddresses`, each with the CIDRs that it stands for. All other entries are CIDRs."""
_MAX_INT32 = 2**31 - 1


class Seconds(float):
    """A duration in seconds. In files and flags, durations have Go's syntax, such as `1m30s`."""


class FlushSeconds(Seconds):
    """A duration in seconds. In files, it has Go's syntax or is a number of nanoseconds."""


class Quantity(str):
    """A Kubernetes quantity, such as `64Ki`. In files, it may also be an integer."""

    __slots__ = ()


Mode: TypeAlias = Literal["iptables", "nftables"]
ModeSetting: TypeAlias = Literal["iptables", "nftables", ""]
"""A proxy mode, or "" for `DEFAULT_MODE`."""
DEFAULT_MODE: Mode = "iptables"
"""The mode if the configuration sets none, as in kube-proxy, whose default becomes nftables in 1.40 (KEP-5343)."""
LocalMode: TypeAlias = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]
Bit: TypeAlias = Annotated[int, Meta(ge=0, le=31)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=_MAX_INT32)]
ByteLimit: TypeAlias = Annotated[int, Meta(ge=1 << 20, le=_MAX_INT32)]
"""A maximum size in bytes. It is large enough for a few hundred typical objects."""
PositiveSeconds: TypeAlias = Annotated[Seconds, Meta(gt=0)]
NonNegativeSeconds: TypeAlias = Annotated[Seconds, Meta(ge=0)]


class Section(Struct, frozen=True, kw_only=True, rename="camel"):
    """A section of the configuration."""


class ClientConnection(Section, frozen=True, kw_only=True):
    """Access to the API server. Only `kubeconfig` has an effect.

    Regardless of the content types, kproxy uses protobuf for watches and JSON for lists.
    """

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: Count = 10


class IPTables(Section, frozen=True, kw_only=True):
    """Settings of iptables mode."""

    masquerade_bit: Bit = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period: PositiveSeconds = Seconds(30)
    min_sync_period: NonNegativeSeconds = Seconds(1)


class NFTables(Section, frozen=True, kw_only=True):
    """Settings of nftables mode."""

    masquerade_bit: Bit = 14
    masquerade_all: bool = False
    sync_period: PositiveSeconds = Seconds(30)
    min_sync_period: NonNegativeSeconds = Seconds(1)


class IPVS(Section, frozen=True, kw_only=True):
    """Settings of ipvs mode. They have no effect."""

    sync_period: Seconds = Seconds(30)
    min_sync_period: Seconds = Seconds(0)
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = field(default=(), name="excludeCIDRs")
    strict_arp: bool = field(default=False, name="strictARP")
    tcp_timeout: Seconds = Seconds(0)
    tcp_fin_timeout: Seconds = Seconds(0)
    udp_timeout: Seconds = Seconds(0)


class Winkernel(Section, frozen=True, kw_only=True):
    """Settings of kube-proxy for Windows. They have no effect."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Section, frozen=True, kw_only=True):
    """The interfaces of local pods. Used if `detectLocalMode` is BridgeInterface or InterfaceNamePrefix."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Section, frozen=True, kw_only=True):
    """Connection tracking limits and timeouts. A value of 0 or false leaves the kernel parameter unchanged.

    `min` is an exception: it is only a lower limit for the value that results from `max_per_core`.
    """

    max_per_core: Count = 32768
    min: Count = 131072
    tcp_established_timeout: NonNegativeSeconds = Seconds(86400)
    tcp_close_wait_timeout: NonNegativeSeconds = Seconds(3600)
    tcp_be_liberal: bool = False
    udp_timeout: NonNegativeSeconds = Seconds(0)
    udp_stream_timeout: NonNegativeSeconds = Seconds(0)


class LogRouting(Section, frozen=True, kw_only=True):
    """The output streams of one log format. The fields have no effect. `info_buffer_size` is in bytes."""

    split_stream: bool = False
    info_buffer_size: Quantity = Quantity("0")


class LogOptions(Section, frozen=True, kw_only=True):
    """The options of each log format. They have no effect."""

    text: LogRouting = LogRouting()
    json: LogRouting = LogRouting()


class VModule(Section, frozen=True, kw_only=True):
    """The log verbosity of the source files whose names match a pattern."""

    file_pattern: str = ""
    verbosity: Count = 0


class Logging(Section, frozen=True, kw_only=True):
    """Log format and verbosity. `flush_frequency` and `options` have no effect."""

    format: Literal["text", "json"] = "text"
    flush_frequency: FlushSeconds = FlushSeconds(5)
    verbosity: Count = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class KproxySection(Section, frozen=True, kw_only=True):
    """The section `kproxy`: settings that kube-proxy does not have. kube-proxy's strict decoder rejects the section.

    In iptables mode, a dispatch chain (such as KUBE-SERVICES) with more than `iptables_dispatch_threshold` rules is
    split by destination. 0 means that dispatch chains are never split.

    If the API server sends a page of a list or an event of a watch that is larger than its maximum, kproxy stops
    reading it and lists the objects again, in smaller pages.

    If `control_socket` is true, the daemon answers `kproxy status` and other commands on a Unix socket.

    If `connection_counters` is true, nftables mode counts the connections to each frontend and endpoint. iptables
    always counts them. `service_connection_metrics` is the maximum number of series of the metric
    `kproxy_service_connections_total`. 0 means that the metric does not exist.
    """

    iptables_dispatch_threshold: Count = 1000
    max_list_page_bytes: ByteLimit = 64 << 20
    max_watch_event_bytes: ByteLimit = 16 << 20
    control_socket: bool = True
    connection_counters: bool = False
    service_connection_metrics: Count = 0


class Config(Section, frozen=True, kw_only=True):
    """A complete configuration.

    IP addresses and CIDRs are in canonical form. `healthz_bind_address` and `metrics_bind_address` are `IP:port`, or ""
    if a flag disabled the server.

    If `mode` is "", the configuration sets no mode, and `DEFAULT_MODE` is the effective one.

    The following fields have no effect: `show_hidden_metrics_for_version`, `enable_profiling`, `config_sync_period`,
    `port_range` and `windows_run_as_service`. For `feature_gates`, see `kproxy.config.validation`.

    kproxy uses only the IP family of `bind_address`. As long as this Node's addresses are unknown, kproxy assumes that
    they belong to that family. In a configuration file, `bindAddress` also determines the IP family of the default
    addresses of the health and metrics servers.
    """

    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"  # noqa: S104 - kproxy does not bind a socket to it
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: ModeSetting = ""
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
    config_sync_period: PositiveSeconds = Seconds(900)
    port_range: str = ""
    windows_run_as_service: bool = False
    kproxy: KproxySection = KproxySection()

    @property
    def effective_mode(self) -> Mode:
        """The mode that is set, or the default."""
        return self.mode or DEFAULT_MODE

    @property
    def backend(self) -> IPTables | NFTables:
        """The section with the settings of the effective mode."""
        return self.nftables if self.effective_mode == "nftables" else self.iptables

    @property
    def cluster_cidrs(self) -> tuple[str, ...]:
        """The CIDRs of `cluster_cidr`, at most one of each IP family."""
        return tuple(self.cluster_cidr.split(",")) if self.cluster_cidr else ()

    @property
    def effective_node_port_addresses(self) -> tuple[str, ...]:
        """The addresses that accept NodePort traffic: CIDRs and keywords. () means all local addresses.

        The default is () in iptables mode and `primary` in nftables mode.
        """
        default = (PRIMARY,) if self.effective_mode == "nftables" else ()
        return self.node_port_addresses or default


def node_name(config: Config, hostname: str) -> str:
    """Return the name of this Node in lower case: `hostname_override` if set, otherwise `hostname`."""
    return (config.hostname_override.strip() or hostname.strip()).lower()
