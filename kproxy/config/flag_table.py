"""Every Linux flag of kube-proxy 1.36, in its spelling."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

Kind: TypeAlias = Literal["text", "bool", "int", "number", "list", "gates", "vmodule"]


class Flag(Struct, frozen=True):
    """A flag that sets fields of the configuration, named as the file spells them. Durations are text.

    Where `blank_is_unset`, the flag with an empty value counts as not given.
    """

    name: str
    fields: tuple[str, ...]
    help: str
    kind: Kind = "text"
    blank_is_unset: bool = False

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}"


CONFIG_FLAGS = (
    # where and who
    Flag("kubeconfig", ("clientConnection.kubeconfig",), "file with the API server's address and credentials"),
    Flag(
        "kube-api-content-type",
        ("clientConnection.contentType",),
        "accepted; kproxy always asks for JSON",
        blank_is_unset=True,
    ),
    Flag("kube-api-qps", ("clientConnection.qps",), "accepted: kproxy has no requests to throttle", "number"),
    Flag("kube-api-burst", ("clientConnection.burst",), "accepted: kproxy has no requests to throttle", "int"),
    Flag("hostname-override", ("hostnameOverride",), "name of this Node (default: the host name)", blank_is_unset=True),
    Flag(
        "bind-address",
        ("bindAddress",),
        "this node's primary IP address; no socket is bound to it",
        blank_is_unset=True,
    ),
    Flag("config-sync-period", ("configSyncPeriod",), "accepted: changes come as they happen"),
    Flag("feature-gates", ("featureGates",), "NAME=true|false,...", "gates"),
    # servers
    Flag("healthz-bind-address", ("healthzBindAddress",), 'IP[:PORT] of the health server, "" for none'),
    Flag("metrics-bind-address", ("metricsBindAddress",), 'IP[:PORT] of the metrics server, "" for none'),
    Flag("bind-address-hard-fail", ("bindAddressHardFail",), "exit if a port cannot be listened on", "bool"),
    Flag("profiling", ("enableProfiling",), "accepted: profiles are those of Go programs", "bool"),
    Flag("show-hidden-metrics-for-version", ("showHiddenMetricsForVersion",), "MAJOR.MINOR"),
    # rules
    Flag("proxy-mode", ("mode",), 'iptables (default), nftables, or "" for nftables where it works'),
    Flag("iptables-masquerade-bit", ("iptables.masqueradeBit",), "bit of the mark for SNAT, 0 to 31 (14)", "int"),
    Flag(
        "masquerade-all",
        ("iptables.masqueradeAll", "nftables.masqueradeAll"),
        "SNAT all traffic to cluster IPs",
        "bool",
    ),
    Flag(
        "iptables-localhost-nodeports",
        ("iptables.localhostNodePorts",),
        "serve NodePorts on 127.0.0.1 too (mode iptables, IPv4; on by default)",
        "bool",
    ),
    Flag(
        "iptables-sync-period",
        ("iptables.syncPeriod", "nftables.syncPeriod"),
        "longest pause before a failed sync is tried again, in either mode (30s)",
    ),
    Flag(
        "iptables-min-sync-period",
        ("iptables.minSyncPeriod", "nftables.minSyncPeriod"),
        "least time between syncs, in either mode (1s); 0: none",
    ),
    Flag("nodeport-addresses", ("nodePortAddresses",), "CIDRs on whose addresses NodePorts are, or primary", "list"),
    # local traffic
    Flag(
        "detect-local-mode",
        ("detectLocalMode",),
        "ClusterCIDR (default), NodeCIDR, BridgeInterface or InterfaceNamePrefix",
        blank_is_unset=True,
    ),
    Flag("cluster-cidr", ("clusterCIDR",), "CIDR of the pods, or one of each family with a comma between"),
    Flag("pod-bridge-interface", ("detectLocal.bridgeInterface",), "for detect-local-mode BridgeInterface"),
    Flag(
        "pod-interface-name-prefix",
        ("detectLocal.interfaceNamePrefix",),
        "for detect-local-mode InterfaceNamePrefix",
    ),
    # the host
    Flag("oom-score-adj", ("oomScoreAdj",), "-1000 to 1000 (-999)", "int"),
    Flag("conntrack-max-per-core", ("conntrack.maxPerCore",), "tracked connections per CPU (32768); 0: leave", "int"),
    Flag("conntrack-min", ("conntrack.min",), "least limit of tracked connections (131072)", "int"),
    Flag(
        "conntrack-tcp-timeout-established",
        ("conntrack.tcpEstablishedTimeout",),
        "idle time of TCP connections (24h); 0: leave",
    ),
    Flag(
        "conntrack-tcp-timeout-close-wait",
        ("conntrack.tcpCloseWaitTimeout",),
        "time in CLOSE_WAIT (1h); 0: leave",
    ),
    Flag("conntrack-tcp-be-liberal", ("conntrack.tcpBeLiberal",), "take no TCP packet for INVALID", "bool"),
    Flag("conntrack-udp-timeout", ("conntrack.udpTimeout",), "time of unanswered UDP flows; 0: leave"),
    Flag("conntrack-udp-timeout-stream", ("conntrack.udpStreamTimeout",), "time of UDP flows; 0: leave"),
    # logging
    Flag("v", ("logging.verbosity",), "verbosity of the log", "int"),
    Flag("vmodule", ("logging.vmodule",), "PATTERN=N,...: verbosity of single source files", "vmodule"),
    Flag("logging-format", ("logging.format",), "text or json", blank_is_unset=True),
    Flag("log-flush-frequency", ("logging.flushFrequency",), "most time that log lines are held back"),
    # without effect
    Flag("log-text-split-stream", ("logging.options.text.splitStream",), "without effect", "bool"),
    Flag("log-text-info-buffer-size", ("logging.options.text.infoBufferSize",), "without effect"),
    Flag("log-json-split-stream", ("logging.options.json.splitStream",), "without effect", "bool"),
    Flag("log-json-info-buffer-size", ("logging.options.json.infoBufferSize",), "without effect"),
    Flag("proxy-port-range", ("portRange",), "without effect"),
    Flag("ipvs-sync-period", ("ipvs.syncPeriod",), "without effect"),
    Flag("ipvs-min-sync-period", ("ipvs.minSyncPeriod",), "without effect"),
    Flag("ipvs-scheduler", ("ipvs.scheduler",), "without effect"),
    Flag("ipvs-exclude-cidrs", ("ipvs.excludeCIDRs",), "without effect", "list"),
    Flag("ipvs-strict-arp", ("ipvs.strictARP",), "without effect", "bool"),
    Flag("ipvs-tcp-timeout", ("ipvs.tcpTimeout",), "without effect"),
    Flag("ipvs-tcpfin-timeout", ("ipvs.tcpFinTimeout",), "without effect"),
    Flag("ipvs-udp-timeout", ("ipvs.udpTimeout",), "without effect"),
    Flag("boot-id-file", (), "without effect"),
    Flag("machine-id-file", (), "without effect"),
)
"""Flags that set fields."""

PORT_FLAGS = (
    Flag("healthz-port", ("healthzBindAddress",), "deprecated: use --healthz-bind-address", "int"),
    Flag("metrics-port", ("metricsBindAddress",), "deprecated: use --metrics-bind-address", "int"),
)
"""Flags that complete an address with a port, or turn its server off with port 0."""
