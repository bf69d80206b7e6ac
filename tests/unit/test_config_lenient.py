"""Problems in the configuration file that kube-proxy's lenient decoder ignores.

They are warnings, or errors with `--strict-config`.
"""

from __future__ import annotations

import json
import re

import pytest

from kproxy.config import Config, load_config
from kproxy.config.types import Conntrack, IPTables, Logging, VModule
from tests.unit.config_files import HEADER, load_error

NO_LONGER = "no longer a field of kube-proxy's configuration"


def lenient(text: str, path: str = "kp.yaml") -> tuple[Config, list[str]]:
    return load_config(text.encode(), path)


def strict_problems(text: str, path: str = "kp.yaml") -> list[str]:
    return load_error(text, path, strict=True).splitlines()


UNKNOWN_FIELDS = {
    "fields of old versions": (
        "bindAddress: 0.0.0.0\n"
        "conntrack:\n  max: 0\n  maxPerCore: 1000\n"
        'portRange: ""\n'
        "resourceContainer: /kube-proxy\n"
        "udpIdleTimeout: 250ms\n"
        "logging: {sanitization: false}\n",
        Config(conntrack=Conntrack(max_per_core=1000)),
        [
            f"kp.yaml:5: conntrack.max: {NO_LONGER}",
            f"kp.yaml:8: resourceContainer: {NO_LONGER}",
            f"kp.yaml:9: udpIdleTimeout: {NO_LONGER}",
            f"kp.yaml:10: logging.sanitization: {NO_LONGER}",
        ],
    ),
    "null fields": (
        "conntrack: {max: null}\nnodePortAddresses: null\nportRange:\nmetadata: {creationTimestamp: null}\n",
        Config(),
        [f"kp.yaml:3: conntrack.max: {NO_LONGER}", "kp.yaml:6: metadata: unknown field"],
    ),
    "metadata": (
        "metadata:\n  name: config\nmode: iptables\n",
        Config(mode="iptables"),
        ["kp.yaml:3: metadata: unknown field"],
    ),
    "field of another section": (
        "ipvs:\n  masqueradeAll: true\n",
        Config(),
        ["kp.yaml:4: ipvs.masqueradeAll: unknown field"],
    ),
    "Go type names of sections": (
        "kubeProxyIPTablesConfiguration:\n  masqueradeAll: true\nkubeProxyIPVSConfiguration: {excludeCIDRs: []}\n",
        Config(),
        [
            "kp.yaml:3: kubeProxyIPTablesConfiguration: unknown field",
            "kp.yaml:5: kubeProxyIPVSConfiguration: unknown field",
        ],
    ),
    "misspelled fields": (
        "clusterCidr: 10.0.0.0/8\niptables:\n  masqueradeBits: 1\n",
        Config(),
        [
            "kp.yaml:3: clusterCidr: unknown field; did you mean clusterCIDR?",
            "kp.yaml:5: iptables.masqueradeBits: unknown field; did you mean masqueradeBit?",
        ],
    ),
    "field in a list item": (
        "logging:\n  vmodule:\n  - {filePattern: a}\n  - filePattern: b\n    verbositi: 2\n",
        Config(logging=Logging(vmodule=(VModule(file_pattern="a"), VModule(file_pattern="b")))),
        ["kp.yaml:7: logging.vmodule[1].verbositi: unknown field; did you mean verbosity?"],
    ),
    "key that is not a string": ("3: 4\n", Config(), ["kp.yaml:3: 3: unknown field"]),
}


@pytest.mark.parametrize(("text", "config", "problems"), UNKNOWN_FIELDS.values(), ids=UNKNOWN_FIELDS)
def test_unknown_fields_are_reported_and_ignored(text: str, config: Config, problems: list[str]) -> None:
    assert lenient(HEADER + text) == (config, [f"{problem} (ignored)" for problem in problems])
    assert strict_problems(HEADER + text) == problems


def test_content_of_unknown_fields_is_not_checked() -> None:
    text = "x: &x {y: *x, z: [{a: 1}]}\n"
    assert lenient(HEADER + text) == (Config(), ["kp.yaml:3: x: unknown field (ignored)"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\niptables: {masqueradeBit: '1'}", "kp.yaml:4: iptables.masqueradeBit: must be an integer from 0"),
        (
            "x: 1\nmode: ipvs",
            "kp.yaml:4: mode: ipvs is deprecated in Kubernetes and not supported by kproxy; use nftables",
        ),
        ('x: 1\nnodePortAddresses: ""', 'kp.yaml:4: nodePortAddresses: must be a list, not ""'),
        ("featureGates: x", 'kp.yaml:3: featureGates: must be a mapping, not "x"'),
    ],
)
def test_invalid_values_of_known_fields_are_errors_without_strict(text: str, message: str) -> None:
    assert load_error(HEADER + text).startswith(message)


def test_last_value_of_a_duplicate_key_applies() -> None:
    text = (
        HEADER
        + "mode: nftables\niptables:\n  masqueradeBit: 1\n  masqueradeBit: 2\n  masqueradeBit: 3\nmode: iptables\n"
    )
    problems = ["kp.yaml:8: mode: duplicate key", "kp.yaml:7: iptables.masqueradeBit: duplicate key"]
    config, warnings = lenient(text)
    assert config == Config(mode="iptables", iptables=IPTables(masquerade_bit=3))
    assert sorted(warnings) == sorted(f"{problem} (the last value applies)" for problem in problems)
    assert sorted(strict_problems(text)) == sorted(problems)


def test_duplicate_keys_in_list_items_and_under_unknown_fields() -> None:
    text = HEADER + "logging:\n  vmodule:\n  - filePattern: a\n    filePattern: b\nmetadata: {name: a, name: b}\n"
    config, warnings = lenient(text)
    assert [item.file_pattern for item in config.logging.vmodule] == ["b"]
    assert sorted(warnings) == [
        "kp.yaml:6: logging.vmodule[0].filePattern: duplicate key (the last value applies)",
        "kp.yaml:7: metadata.name: duplicate key (the last value applies)",
        "kp.yaml:7: metadata: unknown field (ignored)",
    ]


def test_overriding_a_yaml_merge_key_is_not_a_duplicate() -> None:
    text = HEADER + "iptables: &both {masqueradeBit: 3}\nnftables: {<<: *both, masqueradeBit: 4}\n"
    config, warnings = lenient(text)
    assert (config.iptables.masquerade_bit, config.nftables.masquerade_bit, warnings) == (3, 4, [])


def test_duplicate_keys_in_json() -> None:
    header = '{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1",\n "kind": "KubeProxyConfiguration",\n'
    text = header + ' "iptables": {"masqueradeBit": 1,\n  "masqueradeBit": 3}, "x": [{"y": 1, "y": 2}]}'
    problems = [
        "kp.json:4: iptables.masqueradeBit: duplicate key",
        "kp.json:4: x[0].y: duplicate key",
        "kp.json:4: x: unknown field",
    ]
    config, warnings = lenient(text, "kp.json")
    assert config == Config(iptables=IPTables(masquerade_bit=3))
    assert [warning.partition(" (")[0] for warning in warnings] == strict_problems(text, "kp.json") == problems


def test_empty_string_leaves_feature_gates_unset() -> None:
    text = HEADER + 'featureGates: ""\n'
    problem = 'kp.yaml:3: featureGates: must be a mapping, not ""'
    assert lenient(text) == (Config(), [f"{problem} (treated as unset)"])
    assert strict_problems(text) == [problem]


def test_null_feature_gate_is_unset() -> None:
    assert lenient(HEADER + "featureGates: {NoSuchGate: null}") == (Config(), [])


KUBEADM = "apiVersion: kubeadm.k8s.io/v1beta3\nkind: ClusterConfiguration\nnetworking: {podSubnet: 10.244.0.0/16}\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            f"{KUBEADM}---\n{HEADER}mode: nftables\n",
            ["kp.yaml:1: document of kind ClusterConfiguration; only the KubeProxyConfiguration is read"],
        ),
        (
            f"{HEADER}mode: nftables\n---\n{KUBEADM}---\na: 1\n---\n- b\n",
            [
                "kp.yaml:5: document of kind ClusterConfiguration; only the KubeProxyConfiguration is read",
                "kp.yaml:9: document without a kind; only the KubeProxyConfiguration is read",
                "kp.yaml:11: document without a kind; only the KubeProxyConfiguration is read",
            ],
        ),
        (
            f"{HEADER}mode: nftables\n---\n{HEADER}mode: iptables\n",
            ["kp.yaml:5: another KubeProxyConfiguration; only the first one is read"],
        ),
        (f"---\n---\n{HEADER}mode: nftables\n---\n", []),
    ],
    ids=["after another kind", "before other kinds", "twice", "empty documents"],
)
def test_configuration_is_found_among_several_documents(text: str, problems: list[str]) -> None:
    assert lenient(text) == (Config(mode="nftables"), [f"{problem} (ignored)" for problem in problems])
    if problems:
        assert strict_problems(text) == problems
    else:
        assert load_config(text.encode(), "kp.yaml", strict=True)[0].mode == "nftables"


def test_error_is_about_the_first_document_if_none_is_a_configuration() -> None:
    error = load_error(f"{KUBEADM}---\na: 1\n")
    assert re.match(r"kp\.yaml:1: apiVersion: must be kubeproxy\.config.*kubeadm", error)


def test_strict_decoding_accepts_files_without_problems() -> None:
    text = HEADER + "mode: nftables\n"
    assert load_config(text.encode(), "kp.yaml", strict=True) == lenient(text)
    document = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
    assert load_config(json.dumps(document).encode(), "kp.json", strict=True) == (Config(), [])
