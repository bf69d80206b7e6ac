"""What kube-proxy's lenient decoding passes over: a warning here, or with --strict-config an error."""

from __future__ import annotations

import json

import pytest

from kproxy.config import Config, ConfigError, load_config
from kproxy.config.types import Conntrack, IPTables, Logging, VModule

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
NO_LONGER = "no longer a field of kube-proxy's configuration"


def lenient(text: str, path: str = "kp.yaml") -> tuple[Config, list[str]]:
    return load_config(text.encode(), path)


def strict(text: str, path: str = "kp.yaml") -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as caught:
        load_config(text.encode(), path, strict=True)
    return str(caught.value).splitlines()


OF_THE_WILD = {
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
    "fields that are null": (
        "conntrack: {max: null}\nnodePortAddresses: null\nportRange:\nmetadata: {creationTimestamp: null}\n",
        Config(),
        [f"kp.yaml:3: conntrack.max: {NO_LONGER}", "kp.yaml:6: metadata: unknown field"],
    ),
    "metadata": ("metadata:\n  name: config\nmode: iptables\n", Config(), ["kp.yaml:3: metadata: unknown field"]),
    "a field of another section": (
        "ipvs:\n  masqueradeAll: true\n",
        Config(),
        ["kp.yaml:4: ipvs.masqueradeAll: unknown field"],
    ),
    "sections by the names of Go types": (
        "kubeProxyIPTablesConfiguration:\n  masqueradeAll: true\nkubeProxyIPVSConfiguration: {excludeCIDRs: []}\n",
        Config(),
        [
            "kp.yaml:3: kubeProxyIPTablesConfiguration: unknown field",
            "kp.yaml:5: kubeProxyIPVSConfiguration: unknown field",
        ],
    ),
    "a misspelt field": (
        "clusterCidr: 10.0.0.0/8\niptables:\n  masqueradeBits: 1\n",
        Config(),
        [
            "kp.yaml:3: clusterCidr: unknown field; did you mean clusterCIDR?",
            "kp.yaml:5: iptables.masqueradeBits: unknown field; did you mean masqueradeBit?",
        ],
    ),
    "an item of a list": (
        "logging:\n  vmodule:\n  - {filePattern: a}\n  - filePattern: b\n    verbositi: 2\n",
        Config(logging=Logging(vmodule=(VModule(file_pattern="a"), VModule(file_pattern="b")))),
        ["kp.yaml:7: logging.vmodule[1].verbositi: unknown field; did you mean verbosity?"],
    ),
    "a key that is no text": ("3: 4\n", Config(), ["kp.yaml:3: 3: unknown field"]),
}


@pytest.mark.parametrize("name", OF_THE_WILD)
def test_unknown_fields_are_named_and_passed_over(name: str) -> None:
    text, config, problems = OF_THE_WILD[name]
    assert lenient(HEAD + text) == (config, [f"{problem} (ignored)" for problem in problems])
    assert strict(HEAD + text) == problems


def test_what_is_under_an_unknown_field_is_not_looked_at() -> None:
    text = "x: &x {y: *x, z: [{a: 1}]}\n"
    assert lenient(HEAD + text) == (Config(), ["kp.yaml:3: x: unknown field (ignored)"])


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
def test_a_wrong_value_of_a_known_field_stays_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lenient(HEAD + text)
    assert str(caught.value).startswith(message)


def test_a_key_given_twice_has_its_last_value() -> None:
    text = (
        HEAD + "mode: nftables\niptables:\n  masqueradeBit: 1\n  masqueradeBit: 2\n  masqueradeBit: 3\nmode: iptables\n"
    )
    problems = ["kp.yaml:8: mode: duplicate key", "kp.yaml:7: iptables.masqueradeBit: duplicate key"]
    config, warnings = lenient(text)
    assert config == Config(iptables=IPTables(masquerade_bit=3))
    assert sorted(warnings) == sorted(f"{problem} (the last value applies)" for problem in problems)
    assert sorted(strict(text)) == sorted(problems)


def test_a_key_given_twice_in_an_item_of_a_list_and_where_nothing_is_known() -> None:
    text = HEAD + "logging:\n  vmodule:\n  - filePattern: a\n    filePattern: b\nmetadata: {name: a, name: b}\n"
    config, warnings = lenient(text)
    assert [item.file_pattern for item in config.logging.vmodule] == ["b"]
    assert sorted(warnings) == [
        "kp.yaml:6: logging.vmodule[0].filePattern: duplicate key (the last value applies)",
        "kp.yaml:7: metadata.name: duplicate key (the last value applies)",
        "kp.yaml:7: metadata: unknown field (ignored)",
    ]


def test_merged_keys_are_not_given_twice() -> None:
    text = HEAD + "iptables: &both {masqueradeBit: 3}\nnftables: {<<: *both, masqueradeBit: 4}\n"
    config, warnings = lenient(text)
    assert (config.iptables.masquerade_bit, config.nftables.masquerade_bit, warnings) == (3, 4, [])


def test_keys_given_twice_in_json() -> None:
    head = '{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1",\n "kind": "KubeProxyConfiguration",\n'
    text = head + ' "iptables": {"masqueradeBit": 1,\n  "masqueradeBit": 3}, "x": [{"y": 1, "y": 2}]}'
    problems = [
        "kp.json:4: iptables.masqueradeBit: duplicate key",
        "kp.json:4: x[0].y: duplicate key",
        "kp.json:4: x: unknown field",
    ]
    config, warnings = lenient(text, "kp.json")
    assert config == Config(iptables=IPTables(masquerade_bit=3))
    assert [warning.partition(" (")[0] for warning in warnings] == strict(text, "kp.json") == problems


def test_an_empty_text_for_feature_gates_is_unset() -> None:
    text = HEAD + 'featureGates: ""\n'
    problem = 'kp.yaml:3: featureGates: must be a mapping, not ""'
    assert lenient(text) == (Config(), [f"{problem} (treated as unset)"])
    assert strict(text) == [problem]


def test_a_gate_that_is_null_is_unset() -> None:
    assert lenient(HEAD + "featureGates: {NoSuchGate: null}") == (Config(), [])


KUBEADM = "apiVersion: kubeadm.k8s.io/v1beta3\nkind: ClusterConfiguration\nnetworking: {podSubnet: 10.244.0.0/16}\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            f"{KUBEADM}---\n{HEAD}mode: nftables\n",
            ["kp.yaml:1: document of kind ClusterConfiguration; only the KubeProxyConfiguration is read"],
        ),
        (
            f"{HEAD}mode: nftables\n---\n{KUBEADM}---\na: 1\n---\n- b\n",
            [
                "kp.yaml:5: document of kind ClusterConfiguration; only the KubeProxyConfiguration is read",
                "kp.yaml:9: document without a kind; only the KubeProxyConfiguration is read",
                "kp.yaml:11: document without a kind; only the KubeProxyConfiguration is read",
            ],
        ),
        (
            f"{HEAD}mode: nftables\n---\n{HEAD}mode: iptables\n",
            ["kp.yaml:5: another KubeProxyConfiguration; only the first one is read"],
        ),
        (f"---\n---\n{HEAD}mode: nftables\n---\n", []),
    ],
    ids=["behind another", "before others", "twice", "empty ones"],
)
def test_of_several_documents_the_configuration_is_read(text: str, problems: list[str]) -> None:
    assert lenient(text) == (Config(mode="nftables"), [f"{problem} (ignored)" for problem in problems])
    if problems:
        assert strict(text) == problems
    else:
        assert load_config(text.encode(), "kp.yaml", strict=True)[0].mode == "nftables"


def test_of_several_other_documents_the_first_is_complained_about() -> None:
    with pytest.raises(ConfigError, match=r"^kp\.yaml:1: apiVersion: must be kubeproxy\.config.*kubeadm"):
        lenient(f"{KUBEADM}---\na: 1\n")


def test_strict_decoding_takes_what_there_is_nothing_to_say_about() -> None:
    text = HEAD + "mode: nftables\n"
    assert load_config(text.encode(), "kp.yaml", strict=True) == lenient(text)
    document = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
    assert load_config(json.dumps(document).encode(), "kp.json", strict=True) == (Config(), [])
