"""The table of the Linux flags of kube-proxy 1.38, except those that `config/flags.py` adds, such as `--config`."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

FlagKind: TypeAlias = Literal["text", "bool", "int", "number", "list", "gates", "vmodule"]


class Flag(Struct, frozen=True):
    """A flag and the configuration fields that it sets.

    `fields` are dotted paths, spelled as in the configuration file, or empty for flags that set no field. `kind` is
    the type of the value; durations have the kind `text`. `metavar` is the placeholder for the value in the help.
    `choices` are the values that shell completion offers. If `empty_is_unset` is true, an empty value has the same
    effect as omitting the flag.
    """

    name: str
    fields: tuple[str, ...]
    help: str = ""
    kind: FlagKind = "text"
    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()
    empty_is_unset: bool = False

    @property
    def option(self) -> str:
        """The flag with its dashes."""
        return f"--{self.name}"


CONFIGURATION = (
    Flag(
        "hostname-override",
        ("hostnameOverride",),
        "name of this Node (default: the host name of the machine)",
        metavar="NAME",
        empty_is_unset=True,
    ),
)
API_SERVER = (
    Flag(
        "kubeconfig",
        ("clientConnection.kubeconfig",),
        "kubeconfig file with the API server's address and the credentials (default: the Pod's service account)",
        metavar="FILE",
    ),
)
PROXYING = (
    Flag(
        "proxy-mode",
        ("mode",),
        "iptables (default) or nftables; if no mode is set, kproxy warns that the default will become nftables",
        metavar="MODE",
        choices=("iptables", "nftables"),
    ),
    Flag(
        "cluster-cidr",
        ("clusterCIDR",),
        "CIDR of the pods in the cluster, or one CIDR for each IP family of a dual-stack cluster",
        metavar="CIDR[,CIDR]",
    ),
    Flag(
        "detect-local-mode",
        ("detectLocalMode",),
        "how to detect traffic from local pods: ClusterCIDR (default), NodeCIDR, BridgeInterface or "
        "InterfaceNamePrefix",
        metavar="MODE",
        choices=("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"),
        empty_is_unset=True,
    ),
    Flag(
        "pod-bridge-interface",
        ("detectLocal.bridgeInterface",),
        "bridge interface of local pods, for --detect-local-mode=BridgeInterface",
        metavar="NAME",
    ),
    Flag(
        "pod-interface-name-prefix",
        ("detectLocal.interfaceNamePrefix",),
        "name prefix of local pods' interfaces, for --detect-local-mode=InterfaceNamePrefix",
        metavar="NAME",
    ),
    Flag(
        "nodeport-addresses",
        ("nodePortAddresses",),
        "node addresses that accept NodePort connections: CIDRs, primary (the primary addresses of the Node), "
        "localhost (127.0.0.0/8 and ::1) and all, in any combination (default: all in iptables mode, "
        "primary in nftables mode)",
        "list",
        metavar="CIDR|KEYWORD,...",
    ),
    Flag(
        "iptables-localhost-nodeports",
        ("iptables.localhostNodePorts",),
        "accept NodePort connections on 127.0.0.1, in iptables mode only (default: true)",
        "bool",
    ),
    Flag(
        "masquerade-all",
        ("iptables.masqueradeAll", "nftables.masqueradeAll"),
        "masquerade (SNAT) all traffic to ClusterIPs (default: false)",
        "bool",
    ),
    Flag(
        "iptables-masquerade-bit",
        ("iptables.masqueradeBit",),
        "bit of the packet mark that requests masquerading, from 0 to 31, in iptables mode only (default: 14)",
        "int",
        metavar="N",
    ),
)
SYNCING = (
    Flag(
        "iptables-min-sync-period",
        ("iptables.minSyncPeriod", "nftables.minSyncPeriod"),
        "minimum interval between two syncs, in either mode; 0 for no minimum (default: 1s)",
        metavar="DURATION",
    ),
    Flag(
        "iptables-sync-period",
        ("iptables.syncPeriod", "nftables.syncPeriod"),
        "interval of drift checks, and maximum delay before a failed sync is retried, in either mode (default: 30s)",
        metavar="DURATION",
    ),
)
SERVING = (
    Flag(
        "healthz-bind-address",
        ("healthzBindAddress",),
        'address of the health check server; "" disables it (default: 0.0.0.0:10256)',
        metavar="IP[:PORT]",
    ),
    Flag(
        "metrics-bind-address",
        ("metricsBindAddress",),
        'address of the metrics server; "" disables it (default: 127.0.0.1:10249)',
        metavar="IP[:PORT]",
    ),
    Flag(
        "bind-address-hard-fail",
        ("bindAddressHardFail",),
        "exit if a server cannot bind to its port (default: false)",
        "bool",
    ),
)
CONNTRACK = (
    Flag(
        "conntrack-max-per-core",
        ("conntrack.maxPerCore",),
        "maximum number of tracked connections per CPU; 0 leaves the limit unchanged (default: 32768)",
        "int",
        metavar="N",
    ),
    Flag(
        "conntrack-min",
        ("conntrack.min",),
        "minimum for the limit on tracked connections, for machines with few CPUs (default: 131072)",
        "int",
        metavar="N",
    ),
    Flag(
        "conntrack-tcp-timeout-established",
        ("conntrack.tcpEstablishedTimeout",),
        "timeout of idle TCP connections; 0 leaves it unchanged (default: 24h)",
        metavar="DURATION",
    ),
    Flag(
        "conntrack-tcp-timeout-close-wait",
        ("conntrack.tcpCloseWaitTimeout",),
        "timeout of TCP connections in the CLOSE_WAIT state; 0 leaves it unchanged (default: 1h)",
        metavar="DURATION",
    ),
    Flag(
        "conntrack-tcp-be-liberal",
        ("conntrack.tcpBeLiberal",),
        "do not consider out-of-window TCP packets INVALID (default: false)",
        "bool",
    ),
    Flag(
        "conntrack-udp-timeout",
        ("conntrack.udpTimeout",),
        "timeout of UDP flows without replies; 0 leaves it unchanged (default: 0)",
        metavar="DURATION",
    ),
    Flag(
        "conntrack-udp-timeout-stream",
        ("conntrack.udpStreamTimeout",),
        "timeout of UDP flows with replies; 0 leaves it unchanged (default: 0)",
        metavar="DURATION",
    ),
    Flag(
        "oom-score-adj",
        ("oomScoreAdj",),
        "OOM score adjustment of the process, from -1000 (never killed) to 1000 (default: -999)",
        "int",
        metavar="N",
    ),
)
LOGGING = (
    Flag(
        "v",
        ("logging.verbosity",),
        "log verbosity: 2 adds details of each sync, 4 adds debug messages (default: 0)",
        "int",
        metavar="N",
    ),
    Flag(
        "vmodule",
        ("logging.vmodule",),
        "log verbosity of source files whose names, without .py, match a pattern; for the text format only",
        "vmodule",
        metavar="PATTERN=N,...",
    ),
    Flag(
        "logging-format",
        ("logging.format",),
        "log format: text (default) or json",
        metavar="FORMAT",
        choices=("text", "json"),
        empty_is_unset=True,
    ),
)
NO_EFFECT = (
    Flag("bind-address", ("bindAddress",), metavar="IP", empty_is_unset=True),
    Flag("config-sync-period", ("configSyncPeriod",), metavar="DURATION"),
    Flag("feature-gates", ("featureGates",), kind="gates", metavar="NAME=BOOL,..."),
    Flag("kube-api-burst", ("clientConnection.burst",), kind="int", metavar="N"),
    Flag("kube-api-content-type", ("clientConnection.contentType",), empty_is_unset=True),
    Flag("kube-api-qps", ("clientConnection.qps",), kind="number", metavar="N"),
    Flag("log-flush-frequency", ("logging.flushFrequency",), metavar="DURATION"),
    Flag("profiling", ("enableProfiling",), kind="bool"),
    Flag("show-hidden-metrics-for-version", ("showHiddenMetricsForVersion",), metavar="MAJOR.MINOR"),
)
"""Flags without effect. In kube-proxy, they tune features that kproxy implements in a way that needs no tuning.

kproxy accepts them without a warning, except for feature gates that are unknown or disabled. `--bind-address` has one
minor effect, on a warning: see `kproxy.app.family_contexts.local_traffic_warning`.
"""
UNSUPPORTED = (
    Flag("ipvs-exclude-cidrs", ("ipvs.excludeCIDRs",), kind="list", metavar="CIDR,..."),
    Flag("ipvs-min-sync-period", ("ipvs.minSyncPeriod",), metavar="DURATION"),
    Flag("ipvs-scheduler", ("ipvs.scheduler",)),
    Flag("ipvs-strict-arp", ("ipvs.strictARP",), kind="bool"),
    Flag("ipvs-sync-period", ("ipvs.syncPeriod",), metavar="DURATION"),
    Flag("ipvs-tcp-timeout", ("ipvs.tcpTimeout",), metavar="DURATION"),
    Flag("ipvs-tcpfin-timeout", ("ipvs.tcpFinTimeout",), metavar="DURATION"),
    Flag("ipvs-udp-timeout", ("ipvs.udpTimeout",), metavar="DURATION"),
    Flag("log-json-info-buffer-size", ("logging.options.json.infoBufferSize",), metavar="BYTES"),
    Flag("log-json-split-stream", ("logging.options.json.splitStream",), kind="bool"),
    Flag("log-text-info-buffer-size", ("logging.options.text.infoBufferSize",), metavar="BYTES"),
    Flag("log-text-split-stream", ("logging.options.text.splitStream",), kind="bool"),
    Flag("proxy-port-range", ("portRange",), metavar="RANGE"),
    Flag("boot-id-file", (), metavar="FILE"),
    Flag("machine-id-file", (), metavar="FILE"),
)
"""Flags for features that kproxy does not implement. kproxy logs a warning if one of these flags is set."""
PORT_FLAGS = (
    Flag("healthz-port", ("healthzBindAddress",), "deprecated, use --healthz-bind-address", "int", metavar="PORT"),
    Flag("metrics-port", ("metricsBindAddress",), "deprecated, use --metrics-bind-address", "int", metavar="PORT"),
)
"""Flags that set the port of a listen address if the address does not include a port. Port 0 disables the server."""
CONFIG_FLAGS = (
    *CONFIGURATION,
    *API_SERVER,
    *PROXYING,
    *SYNCING,
    *SERVING,
    *CONNTRACK,
    *LOGGING,
    *NO_EFFECT,
    *UNSUPPORTED,
)
"""All flags of this table except `PORT_FLAGS`."""
Group: TypeAlias = Literal[
    "configuration",
    "API server",
    "proxying",
    "syncing",
    "health and metrics",
    "conntrack and memory",
    "logging",
    "no effect",
]
GROUPS: dict[Group, tuple[Flag, ...]] = {
    "configuration": CONFIGURATION,
    "API server": API_SERVER,
    "proxying": PROXYING,
    "syncing": SYNCING,
    "health and metrics": (*SERVING, *PORT_FLAGS),
    "conntrack and memory": CONNTRACK,
    "logging": LOGGING,
    "no effect": (*NO_EFFECT, *UNSUPPORTED),
}
"""The flags under each heading of the help, in the order of the help."""
