"""Every Linux flag of kube-proxy 1.36, in its spelling."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

Kind: TypeAlias = Literal["text", "bool", "int", "number", "list", "gates", "vmodule"]


class Flag(Struct, frozen=True):
    """A flag that sets fields of the configuration, named as the file spells them. Durations are text.

    The help calls its value `value`, and `words` are those that are offered for it. Where `blank_is_unset`, the flag
    with an empty value counts as not given.
    """

    name: str
    fields: tuple[str, ...]
    help: str = ""
    kind: Kind = "text"
    value: str = "TEXT"
    words: tuple[str, ...] = ()
    blank_is_unset: bool = False

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}"


CONFIGURATION = (
    Flag(
        "hostname-override",
        ("hostnameOverride",),
        "name of this Node (default: the host name)",
        value="NAME",
        blank_is_unset=True,
    ),
)
FOLLOWED = (
    Flag(
        "kubeconfig",
        ("clientConnection.kubeconfig",),
        "address of the API server and credentials (default: the Pod's service account)",
        value="FILE",
    ),
)
TRAFFIC = (
    Flag(
        "proxy-mode",
        ("mode",),
        'iptables (default), nftables, or "" for nftables where it works',
        value="MODE",
        words=("iptables", "nftables"),
    ),
    Flag(
        "cluster-cidr",
        ("clusterCIDR",),
        "addresses of the pods; one CIDR, or one of each family",
        value="CIDR[,CIDR]",
    ),
    Flag(
        "detect-local-mode",
        ("detectLocalMode",),
        "how traffic of this node's pods is known: ClusterCIDR (default), NodeCIDR, BridgeInterface or "
        "InterfaceNamePrefix",
        value="HOW",
        words=("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"),
        blank_is_unset=True,
    ),
    Flag(
        "pod-bridge-interface",
        ("detectLocal.bridgeInterface",),
        "the bridge, for --detect-local-mode=BridgeInterface",
        value="NAME",
    ),
    Flag(
        "pod-interface-name-prefix",
        ("detectLocal.interfaceNamePrefix",),
        "how interfaces of pods begin, for --detect-local-mode=InterfaceNamePrefix",
        value="NAME",
    ),
    Flag(
        "nodeport-addresses",
        ("nodePortAddresses",),
        'addresses that NodePorts answer on, or "primary" for the Node\'s own (default: all in mode iptables, '
        "primary in mode nftables)",
        "list",
        value="CIDR,...",
    ),
    Flag(
        "iptables-localhost-nodeports",
        ("iptables.localhostNodePorts",),
        "NodePorts answer on 127.0.0.1 too (mode iptables; default: true)",
        "bool",
    ),
    Flag(
        "masquerade-all",
        ("iptables.masqueradeAll", "nftables.masqueradeAll"),
        "SNAT for all traffic to cluster IPs (default: false)",
        "bool",
    ),
    Flag(
        "iptables-masquerade-bit",
        ("iptables.masqueradeBit",),
        "bit of the packet mark that asks for SNAT, 0 to 31 (mode iptables; default: 14)",
        "int",
        value="N",
    ),
)
SYNC = (
    Flag(
        "iptables-min-sync-period",
        ("iptables.minSyncPeriod", "nftables.minSyncPeriod"),
        "least time between two syncs, in either mode; 0 for none (default: 1s)",
        value="DURATION",
    ),
    Flag(
        "iptables-sync-period",
        ("iptables.syncPeriod", "nftables.syncPeriod"),
        "longest pause before a failed sync is tried again, in either mode (default: 30s)",
        value="DURATION",
    ),
)
SERVING = (
    Flag(
        "healthz-bind-address",
        ("healthzBindAddress",),
        'the health server; "" for none (default: 0.0.0.0:10256)',
        value="IP[:PORT]",
    ),
    Flag(
        "metrics-bind-address",
        ("metricsBindAddress",),
        'the metrics server; "" for none (default: 127.0.0.1:10249)',
        value="IP[:PORT]",
    ),
    Flag(
        "bind-address-hard-fail",
        ("bindAddressHardFail",),
        "end if a port cannot be listened on (default: false)",
        "bool",
    ),
)
CONNTRACK = (
    Flag(
        "conntrack-max-per-core",
        ("conntrack.maxPerCore",),
        "limit of tracked connections per CPU; 0 leaves it (default: 32768)",
        "int",
        value="N",
    ),
    Flag(
        "conntrack-min",
        ("conntrack.min",),
        "but the limit is no less than this (default: 131072)",
        "int",
        value="N",
    ),
    Flag(
        "conntrack-tcp-timeout-established",
        ("conntrack.tcpEstablishedTimeout",),
        "how long idle TCP connections are remembered; 0 leaves it (default: 24h)",
        value="DURATION",
    ),
    Flag(
        "conntrack-tcp-timeout-close-wait",
        ("conntrack.tcpCloseWaitTimeout",),
        "how long those in CLOSE_WAIT are; 0 leaves it (default: 1h)",
        value="DURATION",
    ),
    Flag(
        "conntrack-tcp-be-liberal",
        ("conntrack.tcpBeLiberal",),
        "take no TCP packet for INVALID (default: false)",
        "bool",
    ),
    Flag(
        "conntrack-udp-timeout",
        ("conntrack.udpTimeout",),
        "how long unanswered UDP flows are remembered; 0 leaves it (default: 0)",
        value="DURATION",
    ),
    Flag(
        "conntrack-udp-timeout-stream",
        ("conntrack.udpStreamTimeout",),
        "how long answered UDP flows are; 0 leaves it (default: 0)",
        value="DURATION",
    ),
    Flag(
        "oom-score-adj",
        ("oomScoreAdj",),
        "of the process, -1000 (killed last) to 1000 (default: -999)",
        "int",
        value="N",
    ),
)
LOGGING = (
    Flag("v", ("logging.verbosity",), "verbosity: 2 for each sync, 4 for debugging (default: 0)", "int", value="N"),
    Flag(
        "vmodule",
        ("logging.vmodule",),
        "verbosity of single source files, by name without .py",
        "vmodule",
        value="PATTERN=N,...",
    ),
    Flag(
        "logging-format",
        ("logging.format",),
        "text (default) or json",
        value="FORMAT",
        words=("text", "json"),
        blank_is_unset=True,
    ),
)
ACCEPTED = (
    Flag("bind-address", ("bindAddress",), value="IP", blank_is_unset=True),
    Flag("config-sync-period", ("configSyncPeriod",), value="DURATION"),
    Flag("feature-gates", ("featureGates",), kind="gates", value="NAME=BOOL,..."),
    Flag("kube-api-burst", ("clientConnection.burst",), kind="int", value="N"),
    Flag("kube-api-content-type", ("clientConnection.contentType",), blank_is_unset=True),
    Flag("kube-api-qps", ("clientConnection.qps",), kind="number", value="N"),
    Flag("log-flush-frequency", ("logging.flushFrequency",), value="DURATION"),
    Flag("profiling", ("enableProfiling",), kind="bool"),
    Flag("show-hidden-metrics-for-version", ("showHiddenMetricsForVersion",), value="MAJOR.MINOR"),
)
"""Flags from which nothing follows in kproxy, though it has what they are about."""
WITHOUT_EFFECT = (
    Flag("ipvs-exclude-cidrs", ("ipvs.excludeCIDRs",), kind="list", value="CIDR,..."),
    Flag("ipvs-min-sync-period", ("ipvs.minSyncPeriod",), value="DURATION"),
    Flag("ipvs-scheduler", ("ipvs.scheduler",)),
    Flag("ipvs-strict-arp", ("ipvs.strictARP",), kind="bool"),
    Flag("ipvs-sync-period", ("ipvs.syncPeriod",), value="DURATION"),
    Flag("ipvs-tcp-timeout", ("ipvs.tcpTimeout",), value="DURATION"),
    Flag("ipvs-tcpfin-timeout", ("ipvs.tcpFinTimeout",), value="DURATION"),
    Flag("ipvs-udp-timeout", ("ipvs.udpTimeout",), value="DURATION"),
    Flag("log-json-info-buffer-size", ("logging.options.json.infoBufferSize",), value="BYTES"),
    Flag("log-json-split-stream", ("logging.options.json.splitStream",), kind="bool"),
    Flag("log-text-info-buffer-size", ("logging.options.text.infoBufferSize",), value="BYTES"),
    Flag("log-text-split-stream", ("logging.options.text.splitStream",), kind="bool"),
    Flag("proxy-port-range", ("portRange",), value="RANGE"),
    Flag("boot-id-file", (), value="FILE"),
    Flag("machine-id-file", (), value="FILE"),
)
"""Flags whose matter kproxy has not: each that is given is warned about."""
PORT_FLAGS = (
    Flag("healthz-port", ("healthzBindAddress",), "deprecated: use --healthz-bind-address", "int", value="PORT"),
    Flag("metrics-port", ("metricsBindAddress",), "deprecated: use --metrics-bind-address", "int", value="PORT"),
)
"""Flags that complete an address with a port, or turn its server off with port 0."""
Group: TypeAlias = Literal[
    "configuration",
    "what is followed",
    "traffic",
    "sync",
    "serving",
    "conntrack and memory",
    "logging",
    "without effect",
]
GROUPS: dict[Group, tuple[Flag, ...]] = {
    "configuration": CONFIGURATION,
    "what is followed": FOLLOWED,
    "traffic": TRAFFIC,
    "sync": SYNC,
    "serving": (*SERVING, *PORT_FLAGS),
    "conntrack and memory": CONNTRACK,
    "logging": LOGGING,
    "without effect": (*ACCEPTED, *WITHOUT_EFFECT),
}
"""The flags in the order of the help, under its headings."""
CONFIG_FLAGS = (
    *CONFIGURATION,
    *FOLLOWED,
    *TRAFFIC,
    *SYNC,
    *SERVING,
    *CONNTRACK,
    *LOGGING,
    *ACCEPTED,
    *WITHOUT_EFFECT,
)
"""Flags that set fields."""
