"""What the fields of a configuration must hold beyond their types, and what of it has no effect."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import get_args

import msgspec
from msgspec import Struct

from kproxy.config.decode import ConfigError, Path, Place, format_duration, must_be
from kproxy.config.types import IPVS, PRIMARY, Config, LogOptions, Mode, Winkernel
from kproxy.model.addresses import canonical_address, canonical_cidr, family_of

HEALTHZ_PORT = 10256
METRICS_PORT = 10249
RETIRED_MODES = {
    "ipvs": "deprecated by Kubernetes and not in kproxy",
    "userspace": "removed from Kubernetes",
    "kernelspace": "for Windows",
}
KNOWN_GATES = frozenset(
    {
        "KubeProxyDrainingTerminatingNodes",
        "LoadBalancerIPMode",
        "MultiCIDRServiceAllocator",
        "NFTablesProxyMode",
        "PreferSameTrafficDistribution",
        "ServiceTrafficDistribution",
        "TopologyAwareHints",
    }
)
"""The feature gates whose features kproxy always has."""
_CIDR = "a CIDR (such as 10.244.0.0/16 or fd00::/64)"


def check(config: Config, place: Place) -> Config:
    """Return the configuration with addresses and CIDRs in canonical form. Raises `ConfigError`."""
    _check_names(config, place)
    _check_periods(config, place)
    _check_verbosities(config, place)
    return msgspec.structs.replace(
        config,
        bind_address=_address(config.bind_address, ("bindAddress",), place),
        healthz_bind_address=_endpoint(config.healthz_bind_address, HEALTHZ_PORT, ("healthzBindAddress",), place),
        metrics_bind_address=_endpoint(config.metrics_bind_address, METRICS_PORT, ("metricsBindAddress",), place),
        cluster_cidr=_pair(config.cluster_cidr, ("clusterCIDR",), place),
        node_port_addresses=_node_port_addresses(config.node_port_addresses, place),
    )


def refuse_retired_mode(mode: object, place: Place) -> None:
    """Raise `ConfigError` for a mode that kube-proxy has or had, and kproxy has not."""
    if isinstance(mode, str) and mode in RETIRED_MODES:
        raise ConfigError(f"{place(('mode',))}: {mode} is {RETIRED_MODES[mode]}; use nftables (or iptables)")


def warnings_of(config: Config, place: Place) -> list[str]:
    """Return a line for each group of settings that have no effect."""
    unused = [
        *_changed(config.ipvs, IPVS(), ("ipvs",)),
        *_changed(config.winkernel, Winkernel(), ("winkernel",)),
        *_changed(config.logging.options, LogOptions(), ("logging", "options")),
    ]
    unused += ([("portRange",)] if config.port_range else []) + (
        [("windowsRunAsService",)] if config.windows_run_as_service else []
    )
    warnings = [f"{place(path)}: has no effect in kproxy" for path in unused]
    if config.feature_gates:
        warnings += gate_warnings(config.feature_gates, place(("featureGates",)))
    return warnings


def gate_warnings(gates: Mapping[str, bool], where: str) -> list[str]:
    """Return a line for the gates that kproxy does not know, and one for those it cannot turn off."""
    unknown = sorted(gates.keys() - KNOWN_GATES)
    off = sorted(name for name, on in gates.items() if not on and name in KNOWN_GATES)
    return [
        *([f"{where}: no such gates in kproxy, without effect: {', '.join(unknown)}"] if unknown else []),
        *([f"{where}: always on in kproxy: {', '.join(off)}"] if off else []),
    ]


def has_port(endpoint: str) -> bool:
    """Tell whether a listen address says its port."""
    return canonical_address(endpoint) is None


def _changed(section: Struct, default: Struct, at: Path) -> Iterator[Path]:
    for item in msgspec.structs.fields(type(section)):
        value, usual = getattr(section, item.name), getattr(default, item.name)
        if isinstance(value, Struct):
            yield from _changed(value, usual, (*at, item.encode_name))
        elif value != usual:
            yield (*at, item.encode_name)


INTERFACE_NAME = 15
"""The longest name of a network interface (IFNAMSIZ, less the final NUL)."""


def _check_names(config: Config, place: Place) -> None:
    if config.hostname_override and not config.hostname_override.strip():
        raise must_be(place(("hostnameOverride",)), "a host name", config.hostname_override)
    version = config.show_hidden_metrics_for_version
    if version and not re.fullmatch(r"[0-9]+\.[0-9]+", version):
        raise must_be(place(("showHiddenMetricsForVersion",)), "a minor version such as 1.35", version)
    interfaces = {
        "BridgeInterface": ("bridgeInterface", config.detect_local.bridge_interface),
        "InterfaceNamePrefix": ("interfaceNamePrefix", config.detect_local.interface_name_prefix),
    }
    name, value = interfaces.get(config.detect_local_mode, ("", "unused"))
    if not value:
        where = place(("detectLocal", name))
        raise ConfigError(f"{where}: must be set with detectLocalMode {config.detect_local_mode}")
    longest = INTERFACE_NAME - (name == "interfaceNamePrefix")
    if name and not re.fullmatch(rf"[A-Za-z0-9_.@-]{{1,{longest}}}", value):
        allowed = f"a name of at most {longest} letters, digits, '-', '_', '.' and '@'"
        raise must_be(place(("detectLocal", name)), allowed, value)


def _check_periods(config: Config, place: Place) -> None:
    """Compare the periods of the modes that may be in force: those of another may be leftovers, as in kube-proxy."""
    for mode in (config.mode,) if config.mode else get_args(Mode):
        section = config.resolved(mode).backend
        least, usual = section.min_sync_period, section.sync_period
        if least > usual:
            shown = f"{format_duration(usual)}, but is {format_duration(least)}"
            where = place((mode, "minSyncPeriod"))
            raise ConfigError(f"{where}: must not exceed {mode}.syncPeriod, {shown}")


def _check_verbosities(config: Config, place: Place) -> None:
    if config.logging.vmodule and config.logging.format != "text":
        raise ConfigError(f"{place(('logging', 'vmodule'))}: needs logging.format text")
    for index, item in enumerate(config.logging.vmodule):
        if not item.file_pattern or set("=,") & set(item.file_pattern):
            where = place(("logging", "vmodule", index, "filePattern"))
            raise must_be(where, "the name of a source file, or a pattern, without = and ,", item.file_pattern)


def _address(text: str, at: Path, place: Place) -> str:
    address = canonical_address(text)
    if address is None:
        raise must_be(place(at), "an IP address", text)
    return address


def _endpoint(text: str, port: int, at: Path, place: Place) -> str:
    if not text:
        return ""
    address = canonical_address(text)
    if address is None:
        host, _, number = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        address = canonical_address(host[1:-1] if bracketed else host)
        valid = re.fullmatch(r"[0-9]{1,5}", number) and 1 <= int(number) <= 65535
        if address is None or not valid or bracketed != (":" in host[1:-1]):
            raise must_be(place(at), f"an IP address or IP:port (such as 0.0.0.0:{port} or [::]:{port})", text)
        port = int(number)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _pair(text: str, at: Path, place: Place) -> str:
    if not text:
        return ""
    cidrs = [canonical_cidr(part) for part in text.split(",")]
    found = [cidr for cidr in cidrs if cidr is not None]
    if len(found) < len(cidrs) or len({family_of(cidr) for cidr in found}) < len(found):
        raise must_be(place(at), f"{_CIDR}, or one of each family with a comma between", text)
    return ",".join(found)


def _node_port_addresses(texts: tuple[str, ...], place: Place) -> tuple[str, ...]:
    if texts == (PRIMARY,):
        return texts
    found = []
    for index, text in enumerate(texts):
        cidr = canonical_cidr(text)
        if cidr is None:
            raise must_be(place(("nodePortAddresses", index)), f"{_CIDR}, or {PRIMARY} as the only entry", text)
        found.append(cidr)
    return tuple(dict.fromkeys(found))
