"""Command-line flags, which override the configuration file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from kproxy.config import Config, ConfigError, add_flags, apply_flags, configure, to_yaml
from kproxy.config.flag_table import CONFIG_FLAGS
from kproxy.config.types import VModule
from tests.unit.config_files import HEADER, load


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    return parser.parse_args(arguments)


def with_flags(*arguments: str, config: Config | None = None) -> Config:
    """Apply flags, which must not cause warnings, to a configuration or the default one."""
    result, warnings = apply_flags(config or Config(), parse(*arguments))
    assert warnings == []
    return result


def flag_error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_flags(Config(), parse(*arguments))
    return str(caught.value)


def test_every_configuration_flag_sets_exactly_its_fields() -> None:
    values = {
        "text": "something",
        "bool": None,
        "int": "7",
        "number": "7.5",
        "list": "10.0.0.0/8,fd00::/64",
        "gates": "LoadBalancerIPMode=true",
        "vmodule": "a=1,b*=2",
        "hostname-override": "Node-1",
        "bind-address": "10.0.0.1",
        "healthz-bind-address": "10.0.0.1:1",
        "metrics-bind-address": "10.0.0.1:1",
        "show-hidden-metrics-for-version": "1.35",
        "proxy-mode": "nftables",
        "detect-local-mode": "NodeCIDR",
        "cluster-cidr": "10.0.0.0/8",
        "logging-format": "json",
        "iptables-localhost-nodeports": "false",
        "iptables-min-sync-period": "3s",
    }
    defaults = yaml.safe_load(to_yaml(Config()))
    for flag in CONFIG_FLAGS:
        duration = any(field.endswith(("Period", "Timeout", "Frequency")) for field in flag.fields)
        value = values.get(flag.name, "17s" if duration else "64Ki" if "buffer" in flag.name else values[flag.kind])
        argument = flag.option if value is None else f"{flag.option}={value}"
        config, _ = apply_flags(Config(), parse(argument))
        document = yaml.safe_load(to_yaml(config))
        for path in (field.split(".") for field in flag.fields):
            default = get_field(defaults, path)
            assert get_field(document, path) != default, flag
            set_field(document, path, default)
        assert document == defaults, flag


def get_field(document: Any, path: list[str]) -> Any:
    for key in path:
        document = document[key]
    return document


def set_field(document: Any, path: list[str], value: Any) -> None:
    get_field(document, path[:-1])[path[-1]] = value


KUBE_PROXY_FLAGS = """
bind-address bind-address-hard-fail boot-id-file cleanup cluster-cidr config config-sync-period
conntrack-max-per-core conntrack-min conntrack-tcp-be-liberal conntrack-tcp-timeout-close-wait
conntrack-tcp-timeout-established conntrack-udp-timeout conntrack-udp-timeout-stream detect-local-mode
feature-gates healthz-bind-address healthz-port help hostname-override init-only iptables-localhost-nodeports
iptables-masquerade-bit iptables-min-sync-period iptables-sync-period ipvs-exclude-cidrs ipvs-min-sync-period
ipvs-scheduler ipvs-strict-arp ipvs-sync-period ipvs-tcp-timeout ipvs-tcpfin-timeout ipvs-udp-timeout
kube-api-burst kube-api-content-type kube-api-qps kubeconfig log-flush-frequency log-json-info-buffer-size
log-json-split-stream log-text-info-buffer-size log-text-split-stream logging-format machine-id-file
masquerade-all master metrics-bind-address metrics-port nodeport-addresses oom-score-adj pod-bridge-interface
pod-interface-name-prefix profiling proxy-mode proxy-port-range show-hidden-metrics-for-version v vmodule
write-config-to
"""
"""The flags that kube-proxy logs when it starts, except `version`."""


def test_help_lists_all_flags_of_kube_proxy_without_underscores() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    assert [name for name in KUBE_PROXY_FLAGS.split() if f" --{name}" not in text] == []
    assert "_" not in "".join(word for word in text.split() if word.startswith("--"))


def test_flags_accept_the_syntax_of_pflag() -> None:
    assert with_flags("--proxy-mode=nftables").mode == with_flags("--proxy-mode", "nftables").mode == "nftables"
    assert with_flags("--masquerade-all").backend.masquerade_all
    assert with_flags("--masquerade-all=true").backend.masquerade_all
    assert not with_flags("--masquerade-all=F").backend.masquerade_all
    assert not with_flags("--iptables-localhost-nodeports=false").iptables.localhost_node_ports
    for verbosity in (["-v=5"], ["-v5"], ["-v", "5"], ["--v=5"], ["--v", "5"]):
        assert with_flags(*verbosity).logging.verbosity == 5
    assert with_flags("--proxy_mode=nftables", "--hostname_override", "a").mode == "nftables"
    assert with_flags("--oom-score-adj", "-5").oom_score_adj == -5
    assert with_flags("--iptables-min-sync-period=1m30s", "--iptables-sync-period=2m").iptables.min_sync_period == 90.0


def test_list_flags_can_be_repeated() -> None:
    arguments = ("--nodeport-addresses=10.0.0.0/8,11.0.0.0/8", "--nodeport-addresses=fd00::/64")
    assert with_flags(*arguments).node_port_addresses == ("10.0.0.0/8", "11.0.0.0/8", "fd00::/64")
    assert with_flags("--vmodule=a=1", "--vmodule", "b=2,c=3").logging.vmodule == (
        VModule(file_pattern="a", verbosity=1),
        VModule(file_pattern="b", verbosity=2),
        VModule(file_pattern="c", verbosity=3),
    )


def test_flags_outside_the_configuration_set_no_field() -> None:
    unset = parse()
    assert (unset.config, unset.master, unset.write_config_to) == (None, None, None)
    assert (unset.cleanup, unset.init_only) == (False, False)
    given = parse("--cleanup", "--init-only=false", "--master=https://a", "--write-config-to", "f")
    assert (given.master, given.write_config_to, given.cleanup, given.init_only) == ("https://a", "f", True, False)
    assert apply_flags(Config(), given) == (Config(), [])
    with pytest.raises(argparse.ArgumentError, match="must be true or false, not 'maybe'"):
        parse("--cleanup=maybe")


def test_sync_period_flags_apply_to_both_modes_and_can_be_0() -> None:
    config = with_flags("--iptables-min-sync-period=0", "--iptables-sync-period=10s")
    assert config.iptables.min_sync_period == config.nftables.min_sync_period == 0.0
    assert config.iptables.sync_period == config.nftables.sync_period == 10.0


def test_empty_flags_are_unset_where_they_are_for_kube_proxy() -> None:
    file = load("detectLocalMode: NodeCIDR\nhostnameOverride: a\nclusterCIDR: 10.0.0.0/8")
    assert with_flags("--hostname-override=", "--detect-local-mode=", config=file) == file
    assert with_flags("--cluster-cidr=", config=file).cluster_cidr == ""


def test_empty_mode_flag_overrides_the_mode_of_the_file() -> None:
    file = load("mode: nftables")
    assert with_flags("--proxy-mode=", config=file).mode == with_flags("--proxy-mode", "", config=file).mode == ""
    assert with_flags("--proxy-mode=").mode == ""
    assert with_flags("--hostname-override=a", config=load('mode: ""')).mode == ""


def test_masquerade_all_applies_to_both_modes_and_masquerade_bit_to_iptables() -> None:
    config = with_flags("--masquerade-all", "--iptables-masquerade-bit=3", "--proxy-mode=")
    assert config.iptables.masquerade_all
    assert config.nftables.masquerade_all
    assert (config.iptables.masquerade_bit, config.nftables.masquerade_bit) == (3, 14)


@pytest.mark.parametrize(
    ("arguments", "healthz", "metrics"),
    [
        ((), "0.0.0.0:10256", "127.0.0.1:10249"),
        (("--healthz-bind-address=", "--metrics-bind-address="), "", ""),
        (("--healthz-port=0", "--metrics-port=0"), "", ""),
        (("--healthz-port=80",), "0.0.0.0:10256", "127.0.0.1:10249"),  # the default address includes a port
        (("--healthz-bind-address=::", "--healthz-port=80"), "[::]:80", "127.0.0.1:10249"),
        (("--metrics-bind-address=1.2.3.4", "--metrics-port=80"), "0.0.0.0:10256", "1.2.3.4:80"),
        (("--metrics-bind-address=1.2.3.4",), "0.0.0.0:10256", "1.2.3.4:10249"),
        (("--metrics-bind-address=[::]:7",), "0.0.0.0:10256", "[::]:7"),
        (("--bind-address=::",), "0.0.0.0:10256", "127.0.0.1:10249"),
    ],
)
def test_flags_for_listen_addresses(arguments: tuple[str, ...], healthz: str, metrics: str) -> None:
    config, _ = apply_flags(Config(), parse(*arguments))
    assert (config.healthz_bind_address, config.metrics_bind_address) == (healthz, metrics)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--iptables-masquerade-bit=40", "--iptables-masquerade-bit: must be an integer from 0 to 31, not 40"),
        ("--iptables-masquerade-bit=x", '--iptables-masquerade-bit: must be an integer, not "x"'),
        ("--masquerade-all=maybe", '--masquerade-all: must be true or false, not "maybe"'),
        ("--kube-api-qps=fast", '--kube-api-qps: must be a number, not "fast"'),
        (
            "--proxy-mode=ipvs",
            "--proxy-mode: ipvs is deprecated in Kubernetes and not supported by kproxy; use nftables or iptables",
        ),
        ("--proxy-mode=x", '--proxy-mode: must be iptables, nftables or "", not "x"'),
        (
            "--nodeport-addresses=10.0.0.0/8,primary,x",
            "--nodeport-addresses: must be a CIDR (such as 10.244.0.0/16 or fd00::/64), "
            'primary, localhost or all, not "x"',
        ),
        ("--feature-gates=A", '--feature-gates: must be NAME=true or NAME=false, not "A"'),
        ("--feature-gates=A=2", '--feature-gates: A: must be true or false, not "2"'),
        ("--vmodule=a", '--vmodule: must be PATTERN=N, not "a"'),
        ("--vmodule=a=b", '--vmodule: a: must be an integer, not "b"'),
        ("--hostname-override=  ", '--hostname-override: must be a host name, not "  "'),
        (
            "--healthz-port=70000",
            "--healthz-port: must be a port from 1 to 65535, or 0 to disable the server, not 70000",
        ),
        (
            "--iptables-sync-period=500ms",
            "iptables.minSyncPeriod: must not exceed iptables.syncPeriod (500ms), but is 1s",
        ),
        (
            "--detect-local-mode=BridgeInterface",
            "detectLocal.bridgeInterface: must be set if detectLocalMode is BridgeInterface",
        ),
    ],
)
def test_invalid_flags_are_reported_in_one_line(argument: str, message: str) -> None:
    assert flag_error(argument) == message


def test_deprecated_flags_and_flags_without_effect_are_warnings() -> None:
    arguments = ("--ipvs-scheduler=rr", "--boot-id-file=x", "--healthz-port=1", "--feature-gates=A=true")
    assert apply_flags(Config(), parse(*arguments))[1] == [
        "--ipvs-scheduler, --boot-id-file: no effect in kproxy",
        "--healthz-port: deprecated, use --healthz-bind-address",
        "--feature-gates: unknown feature gates, no effect: A",
    ]


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kp.yaml"
    path.write_text(
        HEADER + "mode: nftables\nhostnameOverride: a\nclusterCIDR: 10.0.0.0/8\niptables: {masqueradeBit: 3}\n"
        "featureGates: {LoadBalancerIPMode: true}\nlogging: {verbosity: 2, vmodule: [{filePattern: x}]}\n"
    )
    arguments = ("--hostname-override", " Node-1 ", "--proxy-mode", "iptables", "--vmodule=y=1")
    config, warnings = configure(parse("--config", str(path), *arguments, "--feature-gates=TopologyAwareHints=true"))
    assert warnings == []
    assert (config.mode, config.hostname_override, config.cluster_cidr) == ("iptables", "node-1", "10.0.0.0/8")
    assert (config.iptables.masquerade_bit, config.logging.verbosity) == (3, 2)
    assert config.feature_gates == {"LoadBalancerIPMode": True, "TopologyAwareHints": True}
    assert [item.file_pattern for item in config.logging.vmodule] == ["y", "x"]


def test_configure_without_a_file_and_with_an_unreadable_file(tmp_path: Path) -> None:
    assert configure(parse()) == (Config(), [])
    with pytest.raises(ConfigError) as caught:
        configure(parse("--config", str(tmp_path / "missing")))
    assert str(caught.value) == f"{tmp_path}/missing: cannot be read: no such file or directory"
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        configure(parse("--config", str(tmp_path)))
