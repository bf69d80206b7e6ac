"""The configuration file: values, defaults, validation and writing."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kproxy.config import Config, ConfigError, as_document, load_config, node_name, to_yaml
from kproxy.config.decode import format_duration, parse_duration
from kproxy.config.flag_table import CONFIG_FLAGS
from kproxy.config.types import ClientConnection, FlushSeconds, Quantity, Seconds, VModule
from kproxy.config.validation import default_mode_warning
from tests.deploy.kubeadm import config_map
from tests.unit.config_files import HEADER, load, load_error, load_warnings

GOLDEN = Path(__file__).parents[1] / "golden"


# Durations


@pytest.mark.parametrize(
    ("text", "seconds", "canonical"),
    [
        ("0", 0, "0s"),
        ("0s", 0, "0s"),
        ("30s", 30, "30s"),
        ("1m30s", 90, "1m30s"),
        ("90s", 90, "1m30s"),
        ("1h", 3600, "1h0m0s"),
        ("24h0m0s", 86400, "24h0m0s"),
        ("1h0.5s", 3600.5, "1h0m0.5s"),
        ("250ms", 0.25, "250ms"),
        ("1.5s", 1.5, "1.5s"),
        (".5m", 30, "30s"),
        ("1.m", 60, "1m0s"),
        ("100us", 0.0001, "100µs"),
        ("1µs", 0.000001, "1µs"),
        ("1500ns", 0.0000015, "1.5µs"),
        ("7ns", 7e-9, "7ns"),
        ("-1m", -60, "-1m0s"),
        ("+2s", 2, "2s"),
    ],
)
def test_durations_are_parsed_and_formatted_as_in_go(text: str, seconds: float, canonical: str) -> None:
    assert parse_duration(text) == seconds
    assert format_duration(seconds) == canonical


@pytest.mark.parametrize(
    "text", ["", "30", "s", "1 s", "1d", "٣s", "1s30", "--1s", ".s", "1e3s", "300000h300000h2000000h", "9" * 400 + "s"]
)
def test_durations_that_go_rejects_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(min_value=-(10**15), max_value=10**15))
def test_formatted_durations_parse_to_the_same_value(nanoseconds: int) -> None:
    assert parse_duration(format_duration(nanoseconds / 1e9)) == nanoseconds / 1e9


# Configuration file


def test_defaults_are_those_of_kube_proxy() -> None:
    config = load("")
    assert config == Config()
    assert yaml.safe_load(to_yaml(config)) == {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "bindAddress": "0.0.0.0",
        "bindAddressHardFail": False,
        "clientConnection": {
            "acceptContentTypes": "",
            "burst": 10,
            "contentType": "application/vnd.kubernetes.protobuf",
            "kubeconfig": "",
            "qps": 5,
        },
        "clusterCIDR": "",
        "configSyncPeriod": "15m0s",
        "conntrack": {
            "maxPerCore": 32768,
            "min": 131072,
            "tcpBeLiberal": False,
            "tcpCloseWaitTimeout": "1h0m0s",
            "tcpEstablishedTimeout": "24h0m0s",
            "udpStreamTimeout": "0s",
            "udpTimeout": "0s",
        },
        "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
        "detectLocalMode": "ClusterCIDR",
        "enableProfiling": False,
        "featureGates": {},
        "healthzBindAddress": "0.0.0.0:10256",
        "hostnameOverride": "",
        "iptables": {
            "localhostNodePorts": True,
            "masqueradeAll": False,
            "masqueradeBit": 14,
            "minSyncPeriod": "1s",
            "syncPeriod": "30s",
        },
        "ipvs": {
            "excludeCIDRs": [],
            "minSyncPeriod": "0s",
            "scheduler": "",
            "strictARP": False,
            "syncPeriod": "30s",
            "tcpFinTimeout": "0s",
            "tcpTimeout": "0s",
            "udpTimeout": "0s",
        },
        "logging": {
            "flushFrequency": "5s",
            "format": "text",
            "options": {
                "json": {"infoBufferSize": "0", "splitStream": False},
                "text": {"infoBufferSize": "0", "splitStream": False},
            },
            "verbosity": 0,
            "vmodule": [],
        },
        "metricsBindAddress": "127.0.0.1:10249",
        "mode": "iptables",
        "nftables": {"masqueradeAll": False, "masqueradeBit": 14, "minSyncPeriod": "1s", "syncPeriod": "30s"},
        "nodePortAddresses": [],
        "oomScoreAdj": -999,
        "portRange": "",
        "showHiddenMetricsForVersion": "",
        "windowsRunAsService": False,
        "winkernel": {
            "enableDSR": False,
            "forwardHealthCheckVip": False,
            "networkName": "",
            "rootHnsEndpointName": "",
            "sourceVip": "",
        },
    }


def test_kubeadm_file_yields_defaults_without_warnings() -> None:
    text = config_map("https://192.0.2.1:6443", cluster_cidr="10.244.0.0/16")["config.conf"]
    connection = ClientConnection(kubeconfig="/var/lib/kube-proxy/kubeconfig.conf")
    expected = Config(client_connection=connection, cluster_cidr="10.244.0.0/16")
    assert load_config(text.encode(), "kp.yaml") == (expected, [])


def test_empty_log_format_is_the_default() -> None:
    assert load('logging: {format: ""}') == Config()


def with_mode(config: Config) -> Config:
    """Return a configuration that sets the effective mode, as written files do."""
    return msgspec.structs.replace(config, mode=config.effective_mode)


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/")), ids=lambda folder: folder.name)
def test_configurations_of_recorded_nodes_load(folder: Path) -> None:
    path = folder / "config.json"
    config, warnings = load_config(path.read_bytes(), str(path))
    assert warnings == []
    assert config.hostname_override == "node-1"
    assert config.cluster_cidrs == ("10.244.0.0/16", "fd00:10:244::/48")
    assert (config.conntrack.max_per_core, config.conntrack.tcp_close_wait_timeout) == (0, 0.0)
    assert load_config(to_yaml(config).encode(), "written.yaml") == (with_mode(config), [])


NON_DEFAULT_VALUES: dict[str, Any] = {
    "mode": "nftables",
    "detect_local_mode": "NodeCIDR",
    "format": "json",
    "bind_address": "fd00::1",
    "healthz_bind_address": "[::1]:1",
    "metrics_bind_address": "10.0.0.1:65535",
    "cluster_cidr": "10.0.0.0/8,fd00::/8",
    "node_port_addresses": ("10.0.0.0/8", "fd00::/64"),
    "show_hidden_metrics_for_version": "1.35",
    "vmodule": (),
}
"""Valid values other than the default, for fields that do not accept arbitrary values of their type."""


def without_defaults(section: type[msgspec.Struct]) -> msgspec.Struct:
    """Return a section in which every field differs from its default."""
    values: dict[str, Any] = {}
    hints = get_type_hints(section)
    for item in msgspec.structs.fields(section):
        field_type = hints[item.name]
        default = getattr(section(), item.name)
        if item.name in NON_DEFAULT_VALUES:
            values[item.name] = NON_DEFAULT_VALUES[item.name]
        elif isinstance(default, msgspec.Struct):
            values[item.name] = without_defaults(type(default))
        elif get_origin(field_type) is tuple:
            values[item.name] = ("10.0.0.0/8",)
        elif isinstance(default, dict):
            values[item.name] = {"LoadBalancerIPMode": True}
        elif isinstance(default, bool):
            values[item.name] = not default
        elif isinstance(default, Seconds):
            values[item.name] = field_type(default + 61.5)
        elif isinstance(default, str):
            values[item.name] = Quantity("64Ki") if isinstance(default, Quantity) else "something"
        else:
            values[item.name] = default + 3
    return section(**values)


def equal_fields(left: Any, right: Any, path: str = "") -> list[str]:
    """Return the paths of the fields that have the same value in two documents."""
    if isinstance(left, dict) and left:
        return [equal for key in left for equal in equal_fields(left[key], right[key], f"{path}.{key}")]
    return [path] if left == right else []


def test_every_field_survives_writing_and_loading() -> None:
    config = without_defaults(Config)
    assert isinstance(config, Config)
    for mode in ("iptables", "nftables"):  # minSyncPeriod must not exceed syncPeriod
        section = msgspec.structs.replace(getattr(config, mode), sync_period=Seconds(3600))
        config = msgspec.structs.replace(config, **{mode: section})
    text = to_yaml(config)
    loaded, warnings = load_config(text.encode(), "kp.yaml")
    assert loaded == config
    assert warnings  # about settings that have no effect
    default, written = yaml.safe_load(to_yaml(Config())), yaml.safe_load(text)
    assert equal_fields(default, written) == [".apiVersion", ".kind", ".logging.vmodule"]


def test_vmodule_survives_writing_and_loading() -> None:
    config = load("logging: {vmodule: [{filePattern: proxier*, verbosity: 5}]}")
    assert config.logging.vmodule == (VModule(file_pattern="proxier*", verbosity=5),)
    assert load_config(to_yaml(config).encode(), "kp.yaml") == (with_mode(config), [])


def test_default_listen_addresses_have_the_ip_family_of_the_bind_address() -> None:
    config = load("bindAddress: fd00:0::1")
    assert config.bind_address == "fd00::1"
    assert (config.healthz_bind_address, config.metrics_bind_address) == ("[::]:10256", "[::1]:10249")
    assert load("bindAddress: '::'\nhealthzBindAddress: 0.0.0.0").healthz_bind_address == "0.0.0.0:10256"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1.2.3.4", "1.2.3.4:10256"),
        ("1.2.3.4:80", "1.2.3.4:80"),
        ("'::'", "'[::]:10256'"),
        ("'[fd00:0::1]:80'", "'[fd00::1]:80'"),
    ],
)
def test_listen_addresses_without_a_port_get_the_default_port(text: str, canonical: str) -> None:
    assert load(f"healthzBindAddress: {text}").healthz_bind_address == canonical.strip("'")


def test_cidrs_are_canonicalized() -> None:
    config = load("clusterCIDR: fd00:0:0::1/48,10.1.2.3/16\nnodePortAddresses: [10.99.0.7/24, 10.99.0.0/24]")
    assert config.cluster_cidr == "fd00::/48,10.1.0.0/16"
    assert config.cluster_cidrs == ("fd00::/48", "10.1.0.0/16")
    assert config.node_port_addresses == ("10.99.0.0/24",)
    assert load("").cluster_cidrs == ()


def test_node_port_addresses_mix_cidrs_and_keywords() -> None:
    config = load("nodePortAddresses: [localhost, 10.99.0.7/24, primary, all, localhost, 'fd00::1/64']")
    assert config.node_port_addresses == ("localhost", "10.99.0.0/24", "primary", "all", "fd00::/64")
    assert load_config(to_yaml(config).encode(), "written.yaml") == (with_mode(config), [])


def test_node_port_addresses_default_to_primary_in_nftables_mode_only() -> None:
    assert load("").effective_node_port_addresses == ()
    assert load("mode: nftables").effective_node_port_addresses == ("primary",)
    assert load("mode: iptables\nnodePortAddresses: [primary]").effective_node_port_addresses == ("primary",)
    chosen = load("mode: nftables\nnodePortAddresses: [10.0.0.0/8]")
    assert chosen.effective_node_port_addresses == ("10.0.0.0/8",)


def test_backend_is_the_section_of_the_active_mode() -> None:
    text = "iptables: {masqueradeBit: 1}\nnftables: {masqueradeBit: 2}\n"
    assert load(text).backend.masquerade_bit == 1
    assert load(text + "mode: nftables").backend.masquerade_bit == 2


@pytest.mark.parametrize("text", ["", "mode: null", "mode:", 'mode: ""'])
def test_mode_that_is_not_set_means_iptables_with_a_warning(text: str) -> None:
    config = load(text)
    assert (config.mode, config.effective_mode, config.backend) == ("", "iptables", config.iptables)
    assert as_document(config)["mode"] == "iptables"
    warning = default_mode_warning(config)
    assert warning.startswith("mode is not set: using iptables; the default becomes nftables in Kubernetes 1.40 ")
    assert "\n" not in warning


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_mode_that_is_set_survives_writing_and_causes_no_warning(mode: str) -> None:
    config = load(f"mode: {mode}")
    assert (config.mode, config.effective_mode, default_mode_warning(config)) == (mode, mode, "")
    assert load_config(to_yaml(config).encode(), "kp.yaml") == (config, [])


def test_flush_frequency_is_a_duration_or_nanoseconds() -> None:
    assert load("logging: {flushFrequency: 2000000000}").logging.flush_frequency == FlushSeconds(2)
    assert load("logging: {flushFrequency: 3s}").logging.flush_frequency == FlushSeconds(3)


def test_sync_periods_of_the_inactive_mode_are_not_checked() -> None:
    text = "nftables: {minSyncPeriod: 1m, syncPeriod: 1s}\n"
    assert load(text).nftables.min_sync_period == 60.0
    assert "nftables.minSyncPeriod: must not exceed" in load_error(HEADER + text + "mode: nftables")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "iptables:\n  masqueradeBit: 32",
            "kp.yaml:4: iptables.masqueradeBit: must be an integer from 0 to 31, not 32",
        ),
        (
            "iptables: {masqueradeBit: -1}",
            "kp.yaml:3: iptables.masqueradeBit: must be an integer from 0 to 31, not -1",
        ),
        (
            "iptables: {masqueradeBit: '1'}",
            'kp.yaml:3: iptables.masqueradeBit: must be an integer from 0 to 31, not "1"',
        ),
        (
            "iptables: {masqueradeBit: true}",
            "kp.yaml:3: iptables.masqueradeBit: must be an integer from 0 to 31, not true",
        ),
        (
            "nftables: {masqueradeBit: 1.0}",
            "kp.yaml:3: nftables.masqueradeBit: must be an integer from 0 to 31, not 1.0",
        ),
        ("iptables: {masqueradeAll: 1}", "kp.yaml:3: iptables.masqueradeAll: must be true or false, not 1"),
        ("iptables: [a]", 'kp.yaml:3: iptables: must be a mapping, not ["a"]'),
        ("hostnameOverride: 7", "kp.yaml:3: hostnameOverride: must be a string, not 7"),
        ("hostnameOverride: '  '", 'kp.yaml:3: hostnameOverride: must be a host name, not "  "'),
        (
            "mode: ipvs",
            "kp.yaml:3: mode: ipvs is deprecated in Kubernetes and not supported by kproxy; use nftables or iptables",
        ),
        ("mode: userspace", "kp.yaml:3: mode: userspace has been removed from Kubernetes; use nftables or iptables"),
        ("mode: kernelspace", "kp.yaml:3: mode: kernelspace is for Windows only; use nftables or iptables"),
        ("mode: IPTables", 'kp.yaml:3: mode: must be iptables, nftables or "", not "IPTables"'),
        ("mode: [ipvs]", 'kp.yaml:3: mode: must be iptables, nftables or "", not ["ipvs"]'),
        ("mode: 0", 'kp.yaml:3: mode: must be iptables, nftables or "", not 0'),
        (
            "iptables: {syncPeriod: 30}",
            "kp.yaml:3: iptables.syncPeriod: must be a duration (such as 30s or 1m30s) greater than 0, not 30",
        ),
        (
            "iptables: {syncPeriod: -1s}",
            'kp.yaml:3: iptables.syncPeriod: must be a duration (such as 30s or 1m30s) greater than 0, not "-1s"',
        ),
        (
            "iptables: {minSyncPeriod: -1s}",
            'kp.yaml:3: iptables.minSyncPeriod: must be a duration (such as 30s or 1m30s) of at least 0, not "-1s"',
        ),
        (
            "iptables: {minSyncPeriod: 31s}",
            "kp.yaml:3: iptables.minSyncPeriod: must not exceed iptables.syncPeriod (30s), but is 31s",
        ),
        (
            "configSyncPeriod: soon",
            'kp.yaml:3: configSyncPeriod: must be a duration (such as 30s or 1m30s) greater than 0, not "soon"',
        ),
        (
            "conntrack: {udpTimeout: -5s}",
            'kp.yaml:3: conntrack.udpTimeout: must be a duration (such as 30s or 1m30s) of at least 0, not "-5s"',
        ),
        ("conntrack: {min: -1}", "kp.yaml:3: conntrack.min: must be an integer from 0 to 2147483647, not -1"),
        (
            "conntrack: {maxPerCore: 2147483648}",
            "kp.yaml:3: conntrack.maxPerCore: must be an integer from 0 to 2147483647, not 2147483648",
        ),
        ("oomScoreAdj: -1001", "kp.yaml:3: oomScoreAdj: must be an integer from -1000 to 1000, not -1001"),
        ("oomScoreAdj: 1001", "kp.yaml:3: oomScoreAdj: must be an integer from -1000 to 1000, not 1001"),
        (
            "clientConnection: {burst: -1}",
            "kp.yaml:3: clientConnection.burst: must be an integer from 0 to 2147483647, not -1",
        ),
        ("clientConnection: {qps: fast}", 'kp.yaml:3: clientConnection.qps: must be a number, not "fast"'),
        ("clientConnection: {qps: .inf}", "kp.yaml:3: clientConnection.qps: must be a number, not null"),
        ("bindAddress: localhost", 'kp.yaml:3: bindAddress: must be an IP address, not "localhost"'),
        ("bindAddress: 10.0.0.1:80", 'kp.yaml:3: bindAddress: must be an IP address, not "10.0.0.1:80"'),
        (
            "healthzBindAddress: localhost:80",
            "kp.yaml:3: healthzBindAddress: must be an IP address or IP:port "
            '(such as 0.0.0.0:10256 or [::]:10256), not "localhost:80"',
        ),
        (
            "metricsBindAddress: 1.2.3.4:0",
            "kp.yaml:3: metricsBindAddress: must be an IP address or IP:port "
            '(such as 0.0.0.0:10249 or [::]:10249), not "1.2.3.4:0"',
        ),
        (
            "metricsBindAddress: '[1.2.3.4]:80'",
            "kp.yaml:3: metricsBindAddress: must be an IP address or IP:port "
            '(such as 0.0.0.0:10249 or [::]:10249), not "[1.2.3.4]:80"',
        ),
        (
            "clusterCIDR: 10.0.0.0",
            "kp.yaml:3: clusterCIDR: must be a CIDR (such as 10.244.0.0/16 or fd00::/64), "
            'or one of each IP family separated by a comma, not "10.0.0.0"',
        ),
        (
            "clusterCIDR: 10.0.0.0/8,11.0.0.0/8",
            "kp.yaml:3: clusterCIDR: must be a CIDR (such as 10.244.0.0/16 or fd00::/64), "
            'or one of each IP family separated by a comma, not "10.0.0.0/8,11.0.0.0/8"',
        ),
        (
            "nodePortAddresses:\n- primary\n- Localhost",
            "kp.yaml:5: nodePortAddresses[1]: must be a CIDR (such as 10.244.0.0/16 or fd00::/64), "
            'primary, localhost or all, not "Localhost"',
        ),
        ("nodePortAddresses: 10.0.0.0/8", 'kp.yaml:3: nodePortAddresses: must be a list, not "10.0.0.0/8"'),
        ("nodePortAddresses: [1]", "kp.yaml:3: nodePortAddresses[0]: must be a string, not 1"),
        (
            "detectLocalMode: Magic",
            "kp.yaml:3: detectLocalMode: must be ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix, "
            'not "Magic"',
        ),
        (
            "detectLocalMode: BridgeInterface",
            "kp.yaml:1: detectLocal.bridgeInterface: must be set if detectLocalMode is BridgeInterface",
        ),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal:\n  bridgeInterface: cbr0",
            "kp.yaml:4: detectLocal.interfaceNamePrefix: must be set if detectLocalMode is InterfaceNamePrefix",
        ),
        ("featureGates: {A: 'yes'}", 'kp.yaml:3: featureGates.A: must be true or false, not "yes"'),
        ("featureGates: [A]", 'kp.yaml:3: featureGates: must be a mapping, not ["A"]'),
        ("logging: {format: xml}", 'kp.yaml:3: logging.format: must be text or json, not "xml"'),
        (
            "logging: {flushFrequency: x}",
            "kp.yaml:3: logging.flushFrequency: must be a duration (such as 30s or 1m30s) "
            'or a number of nanoseconds, not "x"',
        ),
        (
            "logging: {options: {text: {infoBufferSize: big}}}",
            'kp.yaml:3: logging.options.text.infoBufferSize: must be a quantity (such as 0 or 64Ki), not "big"',
        ),
        (
            "logging:\n  vmodule:\n  - {filePattern: a}\n  - {filePattern: 'a,b'}",
            "kp.yaml:6: logging.vmodule[1].filePattern: must be the name or pattern of a source file "
            "(without '=' and ','), not \"a,b\"",
        ),
        (
            "logging: {format: json, vmodule: [{filePattern: a}]}",
            "kp.yaml:3: logging.vmodule: requires logging.format text",
        ),
        (
            "showHiddenMetricsForVersion: v1",
            'kp.yaml:3: showHiddenMetricsForVersion: must be a minor version such as 1.35, not "v1"',
        ),
    ],
)
def test_invalid_values_are_reported_in_one_line(text: str, message: str) -> None:
    assert load_error(HEADER + text) == message


FIELDS = [flag.fields[0] for flag in CONFIG_FLAGS if flag.fields] + ["iptables", "logging.options", "x", "mode.x"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
)


@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field_either_loads_or_raises_config_error(field: str, value: object) -> None:
    for key in reversed(field.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    text = HEADER + yaml.safe_dump(value)
    with suppress(ConfigError):
        load_config(text.encode(), "kp.yaml")


@pytest.mark.parametrize(
    ("value", "abbreviated"),
    [
        ("1" + "0" * 30, "1" + "0" * 30),
        ("1" + "0" * 400, "1" + "0" * 76 + "..."),
        ("[" + "1, " * 50 + "]", "[" + "1," * 38 + "..."),
        ("&a [*a]", "a list"),
    ],
)
def test_long_values_are_abbreviated_in_errors(value: str, abbreviated: str) -> None:
    message = load_error(HEADER + f"oomScoreAdj: {value}")
    assert message == f"kp.yaml:3: oomScoreAdj: must be an integer from -1000 to 1000, not {abbreviated}"


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (b"", "kp.yaml", "kp.yaml: must contain a KubeProxyConfiguration, but is empty"),
        (b"- a", "kp.yaml", 'kp.yaml:1: must be a mapping, not ["a"]'),
        (b"{}", "kp.json", "kp.json:1: apiVersion is missing; must be kubeproxy.config.k8s.io/v1alpha1"),
        (
            b"kind: KubeProxyConfiguration\napiVersion: v1",
            "kp.yaml",
            'kp.yaml:2: apiVersion: must be kubeproxy.config.k8s.io/v1alpha1, not "v1"',
        ),
        (
            b'{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1",\n"kind": "Pod"}',
            "kp.json",
            'kp.json:2: kind: must be KubeProxyConfiguration, not "Pod"',
        ),
        (b'{"kind": }', "kp.json", "kp.json:1:10: not valid JSON: invalid character"),
    ],
)
def test_files_of_another_kind_or_format_are_rejected(text: bytes, path: str, message: str) -> None:
    assert load_error(text, path) == message


def test_settings_without_effect_are_warnings() -> None:
    assert load_warnings("ipvs:\n  scheduler: wrr\n  strictARP: true\nwinkernel: {networkName: x}\nportRange: 1-2") == [
        "kp.yaml:4: ipvs.scheduler: no effect in kproxy",
        "kp.yaml:5: ipvs.strictARP: no effect in kproxy",
        "kp.yaml:6: winkernel.networkName: no effect in kproxy",
        "kp.yaml:7: portRange: no effect in kproxy",
    ]
    assert load_warnings("windowsRunAsService: true\nlogging: {options: {json: {splitStream: true}}}") == [
        "kp.yaml:4: logging.options.json.splitStream: no effect in kproxy",
        "kp.yaml:3: windowsRunAsService: no effect in kproxy",
    ]
    assert load_warnings("featureGates: {B: true, A: false, NFTablesProxyMode: false, LoadBalancerIPMode: true}") == [
        "kp.yaml:3: featureGates: unknown feature gates, no effect: A, B",
        "kp.yaml:3: featureGates: cannot be disabled in kproxy: NFTablesProxyMode",
    ]


@pytest.mark.parametrize("enabled", ["true", "false"])
@pytest.mark.parametrize("gate", ["KubeProxyIPVS", "KubeProxyNFTablesLocalhostNodePorts"])
def test_gates_that_may_have_either_value_cause_no_warning(gate: str, enabled: str) -> None:
    assert load(f"featureGates: {{{gate}: {enabled}}}").feature_gates == {gate: enabled == "true"}


@pytest.mark.parametrize("gate", ["NFTablesNetlink", "RelaxedServiceNameValidation"])
def test_gates_of_features_that_are_always_enabled(gate: str) -> None:
    assert load(f"featureGates: {{{gate}: true}}").feature_gates == {gate: True}
    assert load_warnings(f"featureGates: {{{gate}: false}}") == [
        f"kp.yaml:3: featureGates: cannot be disabled in kproxy: {gate}"
    ]


def test_node_name_is_the_override_or_the_host_name() -> None:
    assert node_name(Config(), " Host.Example \n") == "host.example"
    assert node_name(Config(hostname_override=" Node-1 "), "host") == "node-1"


def test_json_files_are_loaded_without_importing_a_yaml_parser() -> None:
    program = (
        "import sys; from kproxy.config import load_config\n"
        f"load_config(open({str(GOLDEN / 'clusterip' / 'config.json')!r}, 'rb').read(), 'config.json')\n"
        "sys.exit('yaml' in sys.modules or 'kubernetes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_config_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Config().mode = "nftables"  # type: ignore[misc]


def test_kproxy_section_is_written_only_if_it_differs_from_the_default() -> None:
    assert "kproxy" not in as_document(Config())
    config = load("kproxy: {iptablesDispatchThreshold: 0}")
    assert config.kproxy.iptables_dispatch_threshold == 0
    assert as_document(config)["kproxy"] == {
        "iptablesDispatchThreshold": 0,
        "maxListPageBytes": 64 << 20,
        "maxWatchEventBytes": 16 << 20,
        "controlSocket": True,
        "connectionCounters": False,
        "serviceConnectionMetrics": 0,
    }


@pytest.mark.parametrize("field", ["maxListPageBytes", "maxWatchEventBytes"])
@pytest.mark.parametrize("value", ["0", "-1", "1000", "64Mi", "1.5e9", "9999999999"])
def test_maximum_sizes_are_numbers_of_bytes(field: str, value: str) -> None:
    allowed = "must be an integer from 1048576 to 2147483647"
    assert f"kproxy.{field}: {allowed}" in load_error(HEADER + f"kproxy: {{{field}: {value}}}")


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_dispatch_threshold_must_be_a_nonnegative_integer(value: str) -> None:
    assert "kproxy.iptablesDispatchThreshold" in load_error(HEADER + f"kproxy: {{iptablesDispatchThreshold: {value}}}")
