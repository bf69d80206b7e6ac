"""Validate a configuration beyond the types of its fields, and find settings that have no effect."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import Struct

from kproxy.config.decode import ConfigError, Locate, format_duration, must_be
from kproxy.config.types import IPVS, NODE_PORT_KEYWORDS, Config, LogOptions, Winkernel
from kproxy.documents.document import FieldPath
from kproxy.model.addresses import canonical_address, canonical_cidr, family_of

HEALTHZ_PORT = 10256
METRICS_PORT = 10249
RETIRED_MODES = {
    "ipvs": "ipvs is deprecated in Kubernetes and not supported by kproxy",
    "userspace": "userspace has been removed from Kubernetes",
    "kernelspace": "kernelspace is for Windows only",
}
"""Current and former modes of kube-proxy that kproxy does not support, each with the reason."""
KNOWN_GATES = frozenset(
    {
        "KubeProxyDrainingTerminatingNodes",
        "LoadBalancerIPMode",
        "MultiCIDRServiceAllocator",
        "NFTablesNetlink",
        "NFTablesProxyMode",
        "PreferSameTrafficDistribution",
        "RelaxedServiceNameValidation",
        "ServiceTrafficDistribution",
        "TopologyAwareHints",
    }
)
"""Feature gates whose features are always enabled in kproxy."""
SWITCHABLE_GATES: Mapping[str, bool] = {"KubeProxyNFTablesLocalhostNodePorts": True}
"""Feature gates that enable or disable something in kproxy, with their defaults."""
IRRELEVANT_GATES = frozenset({"KubeProxyIPVS"})
"""Feature gates of features that kproxy does not have, whatever the value."""
MAX_INTERFACE_NAME = 15
"""Maximum length of an interface name in bytes: IFNAMSIZ (linux/if.h) without the terminating NUL."""
_CIDR = "a CIDR (such as 10.244.0.0/16 or fd00::/64)"


def check(config: Config, locate: Locate) -> Config:
    """Validate a configuration. Return a copy with addresses and CIDRs in canonical form. Raises `ConfigError`."""
    _check_names(config, locate)
    _check_periods(config, locate)
    _check_verbosities(config, locate)
    return msgspec.structs.replace(
        config,
        bind_address=_address(config.bind_address, ("bindAddress",), locate),
        healthz_bind_address=_endpoint(config.healthz_bind_address, HEALTHZ_PORT, ("healthzBindAddress",), locate),
        metrics_bind_address=_endpoint(config.metrics_bind_address, METRICS_PORT, ("metricsBindAddress",), locate),
        cluster_cidr=_cidr_pair(config.cluster_cidr, ("clusterCIDR",), locate),
        node_port_addresses=_node_port_addresses(config.node_port_addresses, locate),
    )


def reject_retired_mode(mode: object, locate: Locate) -> None:
    """Raise `ConfigError` if `mode` is one of `RETIRED_MODES`."""
    if isinstance(mode, str) and mode in RETIRED_MODES:
        raise ConfigError(f"{locate(('mode',))}: {RETIRED_MODES[mode]}; use nftables or iptables")


def ineffective_settings(config: Config, locate: Locate) -> list[str]:
    """Return one-line warnings about settings of features that kproxy does not implement, and about feature gates."""
    paths = [
        *_changed(config.ipvs, IPVS(), ("ipvs",)),
        *_changed(config.winkernel, Winkernel(), ("winkernel",)),
        *_changed(config.logging.options, LogOptions(), ("logging", "options")),
    ]
    paths += ([("portRange",)] if config.port_range else []) + (
        [("windowsRunAsService",)] if config.windows_run_as_service else []
    )
    warnings = [f"{locate(path)}: no effect in kproxy" for path in paths]
    if config.feature_gates:
        warnings += gate_warnings(config.feature_gates, locate(("featureGates",)))
    return warnings


def gate_warnings(gates: Mapping[str, bool], location: str) -> list[str]:
    """Return one-line warnings: one that lists unknown feature gates, and one that lists known gates that are disabled.

    A warning with an empty list is omitted.
    """
    unknown = sorted(gates.keys() - KNOWN_GATES - SWITCHABLE_GATES.keys() - IRRELEVANT_GATES)
    disabled = sorted(name for name, enabled in gates.items() if not enabled and name in KNOWN_GATES)
    return [
        *([f"{location}: unknown feature gates, no effect: {', '.join(unknown)}"] if unknown else []),
        *([f"{location}: cannot be disabled in kproxy: {', '.join(disabled)}"] if disabled else []),
    ]


def default_mode_warning(config: Config) -> str:
    """Return one line that says which mode is used because the configuration sets none, or "" if it sets one."""
    if config.mode:
        return ""
    return (
        f"mode is not set: using {config.effective_mode}; the default becomes nftables in Kubernetes 1.40 (KEP-5343): "
        "set mode (--proxy-mode) to iptables to keep it, or to nftables"
    )


def has_port(endpoint: str) -> bool:
    """Return whether a listen address includes a port, that is, whether it is not merely an IP address.

    The result is also true for "" (the server is disabled) and for invalid text.
    """
    return canonical_address(endpoint) is None


def _changed(section: Struct, default: Struct, path: FieldPath) -> Iterator[FieldPath]:
    """Yield the paths of the fields in a section, including nested ones, that differ from the default."""
    for name, field in zip(section.__struct_encode_fields__, section.__struct_fields__, strict=True):
        value, default_value = getattr(section, field), getattr(default, field)
        if isinstance(value, Struct):
            yield from _changed(value, default_value, (*path, name))
        elif value != default_value:
            yield (*path, name)


def _check_names(config: Config, locate: Locate) -> None:
    if config.hostname_override and not config.hostname_override.strip():
        raise must_be(locate(("hostnameOverride",)), "a host name", config.hostname_override)
    version = config.show_hidden_metrics_for_version
    if version and not re.fullmatch(r"[0-9]+\.[0-9]+", version):
        raise must_be(locate(("showHiddenMetricsForVersion",)), "a minor version such as 1.35", version)
    interfaces = {
        "BridgeInterface": ("bridgeInterface", config.detect_local.bridge_interface),
        "InterfaceNamePrefix": ("interfaceNamePrefix", config.detect_local.interface_name_prefix),
    }
    name, value = interfaces.get(config.detect_local_mode, ("", "unused"))
    if not value:
        location = locate(("detectLocal", name))
        raise ConfigError(f"{location}: must be set if detectLocalMode is {config.detect_local_mode}")
    longest = MAX_INTERFACE_NAME - (name == "interfaceNamePrefix")
    if name and not re.fullmatch(rf"[A-Za-z0-9_.@-]{{1,{longest}}}", value):
        allowed = f"a name of at most {longest} letters, digits, '-', '_', '.' and '@'"
        raise must_be(locate(("detectLocal", name)), allowed, value)


def _check_periods(config: Config, locate: Locate) -> None:
    """Check the sync periods of the effective mode. Those of the other mode are not checked, as in kube-proxy."""
    mode, section = config.effective_mode, config.backend
    if section.min_sync_period > section.sync_period:
        location = locate((mode, "minSyncPeriod"))
        maximum, actual = format_duration(section.sync_period), format_duration(section.min_sync_period)
        raise ConfigError(f"{location}: must not exceed {mode}.syncPeriod ({maximum}), but is {actual}")


def _check_verbosities(config: Config, locate: Locate) -> None:
    if config.logging.vmodule and config.logging.format != "text":
        raise ConfigError(f"{locate(('logging', 'vmodule'))}: requires logging.format text")
    for index, item in enumerate(config.logging.vmodule):
        if not item.file_pattern or set("=,") & set(item.file_pattern):
            location = locate(("logging", "vmodule", index, "filePattern"))
            raise must_be(location, "the name or pattern of a source file (without '=' and ',')", item.file_pattern)


def _address(text: str, path: FieldPath, locate: Locate) -> str:
    address = canonical_address(text)
    if address is None:
        raise must_be(locate(path), "an IP address", text)
    return address


def _endpoint(text: str, port: int, path: FieldPath, locate: Locate) -> str:
    if not text:
        return ""
    address = canonical_address(text)
    if address is None:
        host, _, number = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        address = canonical_address(host[1:-1] if bracketed else host)
        valid = re.fullmatch(r"[0-9]{1,5}", number) and 1 <= int(number) <= 65535
        if address is None or not valid or bracketed != (":" in host[1:-1]):
            raise must_be(locate(path), f"an IP address or IP:port (such as 0.0.0.0:{port} or [::]:{port})", text)
        port = int(number)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _cidr_pair(text: str, path: FieldPath, locate: Locate) -> str:
    if not text:
        return ""
    cidrs = [canonical_cidr(part) for part in text.split(",")]
    valid = [cidr for cidr in cidrs if cidr is not None]
    if len(valid) < len(cidrs) or len({family_of(cidr) for cidr in valid}) < len(valid):
        raise must_be(locate(path), f"{_CIDR}, or one of each IP family separated by a comma", text)
    return ",".join(valid)


def _node_port_addresses(texts: tuple[str, ...], locate: Locate) -> tuple[str, ...]:
    entries = []
    for index, text in enumerate(texts):
        entry = text if text in NODE_PORT_KEYWORDS else canonical_cidr(text)
        if entry is None:
            *others, last = NODE_PORT_KEYWORDS
            allowed = f"{_CIDR}, {', '.join(others)} or {last}"
            raise must_be(locate(("nodePortAddresses", index)), allowed, text)
        entries.append(entry)
    return tuple(dict.fromkeys(entries))
