"""`kproxy explain` names the one reason why a Service does not work, and says when it works."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.cli.explain import gather
from kproxy.cli.explain_text import explanation_lines
from kproxy.cli.main import main
from kproxy.cli.output import WIDTH, Style, width
from kproxy.cli.parser import parse
from kproxy.config import configure
from kproxy.diagnose.cluster_objects import cluster_objects
from kproxy.diagnose.explain import explain
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import NoteCode, ReasonCode, ServiceExplanation
from kproxy.diagnose.report import document, schema
from tests.unit.explain_cases import (
    BALANCER,
    BROKEN,
    DUAL_STACK,
    NO_PORTS_SLICE,
    NODE_PORT,
    PODS,
    REMOTE_SLICE,
    SERVICE,
    SLICE,
    SLICE_IPV6,
    SOUND,
    UNREADY_SLICE,
    SetUp,
    cluster,
    edit,
    no_cidrs,
)

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
MODES = ("iptables", "nftables")
VALIDATOR = Draft202012Validator(schema(ServiceExplanation))


def explained(setup: SetUp, folder: Path, mode: str = "iptables") -> ServiceExplanation:
    """Explain a set-up as the command does."""
    path = folder / "all.yaml"
    path.write_text(setup.yaml)
    flags = [f"--objects={path}", "--hostname-override=node-1", f"--proxy-mode={mode}", *setup.flags]
    options = parse(["explain", setup.key, *flags])
    return explain(gather(options, configure(options)[0], setup.key), setup.client)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setup", [*BROKEN, *SOUND], ids=lambda setup: setup.name)
def test_verdict_and_reason(setup: SetUp, mode: str, tmp_path: Path) -> None:
    report = explained(setup, tmp_path, mode)
    assert (report.verdict, report.reason.code if report.reason else None) == (setup.verdict, setup.code)
    if report.reason is not None:
        assert setup.text in " ".join((report.reason.message, *report.reason.details, report.reason.fix))
        assert report.reason.fix


@pytest.mark.parametrize("setup", BROKEN, ids=lambda setup: setup.name)
def test_consequences_are_no_reasons(setup: SetUp, tmp_path: Path) -> None:
    """All ports name the same reason or work, and remarks do not repeat it."""
    report = explained(setup, tmp_path)
    assert "NodeUnknown" not in {note.code for note in report.notes}
    assert {port.reason for port in report.ports} <= {None, report.reason}
    assert report.reason is None or report.reason.code not in {note.code for note in report.notes}


@pytest.mark.parametrize("setup", SOUND, ids=lambda setup: setup.name)
def test_notes_of_sound_services(setup: SetUp, tmp_path: Path) -> None:
    assert {note.code for note in explained(setup, tmp_path).notes} == setup.notes


@pytest.mark.parametrize("setup", [*BROKEN, *SOUND], ids=lambda setup: setup.name)
def test_output(setup: SetUp, tmp_path: Path) -> None:
    report = explained(setup, tmp_path)
    VALIDATOR.validate(document(report))
    lines = list(explanation_lines(report, Style()))
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].endswith(report.verdict)
    assert [width(line) for line in explanation_lines(report, Style(colored=True))] == list(map(len, lines))


def test_every_reason_has_a_set_up() -> None:
    elsewhere = {"Quarantined", "NotSyncedYet", "Drifted", "StaleConntrack"}
    assert {setup.code for setup in BROKEN} == set(get_args(ReasonCode)) - elsewhere


@pytest.mark.parametrize(("mode", "expected"), [("iptables", "REJECTED"), ("nftables", "DROPPED")])
def test_source_ranges_without_endpoints(mode: str, expected: str, tmp_path: Path) -> None:
    """In nftables mode, the ranges are checked before connections without endpoints are rejected."""
    text = edit(BALANCER, "  selector:", "  loadBalancerSourceRanges: [198.51.100.0/24]\n  selector:")
    setup = SetUp("ranges", cluster(text, UNREADY_SLICE), "REJECTED", client="203.0.113.7")
    report = explained(setup, tmp_path, mode)
    assert report.verdict == expected
    outcomes = {each.kind: each.outcome for each in report.ports[0].frontends}
    assert outcomes == {"ClusterIP": "dropped", "LoadBalancer": expected.lower(), "NodePort": "rejected"}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1", "this node"),
        ("10.96.0.82", "the ClusterIP of shop/api"),
        ("10.244.9.9", "not known to be in the cluster"),
    ],
)
def test_places_of_clients(address: str, text: str, tmp_path: Path) -> None:
    report = explained(SetUp("place", no_cidrs(SERVICE, SLICE), "WORKS", client=address), tmp_path)
    assert report.client is not None
    assert text in report.client.location
    assert report.client.inside is (True if text == "this node" else None)
    assert [each.outcome for each in report.ports[0].frontends] == ["forwarded"]


def test_files_without_endpoint_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(cluster(SERVICE, PODS))
    code, output, errors = run(capsys, "shop/api", f"--objects={path}", "--hostname-override=node-1")
    assert (code, output) == (3, "")
    assert "contains no EndpointSlices" in errors


def test_a_frontend_that_leaves_no_room_beside_it_fits(tmp_path: Path) -> None:
    long = SLICE_IPV6.replace("fd00:10:244:2::5", "fd00:1111:2222:3333:4444:5555:6666:7777").replace("node-2", "n" * 50)
    text = cluster(DUAL_STACK, long.replace("name: http, port: 8080", "name: other, port: 8080"))
    lines = in_text(SetUp("wide", text, "REJECTED"), tmp_path).split("\n")
    assert max(map(len, lines)) <= WIDTH
    assert any(line.startswith("        its slice has no TCP port") for line in lines)


def test_files_with_pods_of_another_namespace(tmp_path: Path) -> None:
    text = cluster(SERVICE, UNREADY_SLICE, PODS.replace("namespace: shop", "namespace: other"))
    report = explained(SetUp("pods", text, "REJECTED"), tmp_path)
    assert report.reason is not None
    assert report.reason.code == "NoReadyEndpoints"
    assert "Pods of namespace shop (not in the files)" in report.unseen


def test_source_ranges_that_the_load_balancer_enforces(tmp_path: Path) -> None:
    name = "source ranges of a load balancer with only a host name"
    report = explained(next(each for each in SOUND if each.name == name), tmp_path)
    text = next(each.message for each in report.notes if each.code == "SourceRangesWithoutLoadBalancer")
    assert text.startswith("the load balancer itself, not this node, enforces")


LOCAL_NODE_PORT = edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:")


@pytest.mark.parametrize(
    ("client", "flags", "node_port"),
    [
        ("10.244.1.77", (), "dropped"),
        ("10.244.1.77", ("--cluster-cidr=10.244.0.0/16",), "forwarded"),
        ("10.244.2.77", ("--cluster-cidr=10.244.0.0/16",), "forwarded"),
        ("10.244.1.77", ("--detect-local-mode=NodeCIDR",), "forwarded"),
        ("10.244.2.77", ("--detect-local-mode=NodeCIDR",), "dropped"),
        ("192.168.0.11", (), "forwarded"),
        ("192.168.0.12", (), "dropped"),
        ("203.0.113.7", ("--cluster-cidr=10.244.0.0/16",), "dropped"),
    ],
)
def test_policy_local_depends_on_the_recognition_of_pods(
    client: str, flags: tuple[str, ...], node_port: str, tmp_path: Path
) -> None:
    setup = SetUp("local", cluster(LOCAL_NODE_PORT, REMOTE_SLICE), "WORKS", client=client, flags=flags)
    frontends = {each.kind: each.outcome for each in explained(setup, tmp_path).ports[0].frontends}
    assert frontends["NodePort"] == node_port


def test_the_body_is_about_the_node_of_the_client(tmp_path: Path) -> None:
    """Both hints and policies: as on node-2, where the packets of its pods meet the rules."""
    hints = SLICE.replace("zone: a}", "zone: a, hints: {forZones: [{name: a}]}}").replace(
        "zone: b}\n", "zone: b, hints: {forZones: [{name: b}]}}\n"
    )
    report = explained(SetUp("hints", cluster(SERVICE, hints), "WORKS", client="10.244.2.77"), tmp_path)
    assert [each.used for each in report.ports[0].endpoints] == [False, True]
    internal = edit(SERVICE, "  selector:", "  internalTrafficPolicy: Local\n  selector:")
    report = explained(SetUp("local", cluster(internal, REMOTE_SLICE), "WORKS", client="10.244.2.77"), tmp_path)
    assert [each.outcome for each in report.ports[0].frontends] == ["forwarded"]


def test_words_about_endpoints(tmp_path: Path) -> None:
    one_draining = edit(
        SLICE,
        "[10.244.1.5], conditions: {ready: true, serving: true, terminating: false",
        "[10.244.1.5], conditions: {ready: false, serving: true, terminating: true",
    )
    local, _ = explained(SetUp("x", cluster(LOCAL_NODE_PORT, one_draining), "WORKS"), tmp_path).ports[0].endpoints
    assert "no endpoint on node-1 is ready" in local.message
    internal = edit(NODE_PORT, "  selector:", "  internalTrafficPolicy: Local\n  selector:")
    _, remote = explained(SetUp("x", cluster(internal, SLICE), "WORKS"), tmp_path).ports[0].endpoints
    assert remote.message == "used, except for traffic to the ClusterIP (internalTrafficPolicy: Local)"


def in_text(setup: SetUp, folder: Path) -> str:
    return "\n".join(explanation_lines(explained(setup, folder), Style()))


def test_names_of_any_length_and_with_control_characters_fit(tmp_path: Path) -> None:
    hostile = "\\e[31mred\\u202e"
    setups = [
        SetUp("long", cluster(SERVICE, SLICE, PODS).replace("node-1", "n" * 250).replace("api-1", "p" * 250), "WORKS"),
        SetUp(
            "type", cluster(SERVICE, edit(SLICE, "addressType: IPv4", f'addressType: "{hostile}"'), PODS), "REJECTED"
        ),
        SetUp(
            "target",
            cluster(edit(SERVICE, "targetPort: http", f'targetPort: "{hostile}"'), NO_PORTS_SLICE, PODS),
            "REJECTED",
        ),
        SetUp("address", cluster(SERVICE, edit(SLICE, "[10.244.1.5]", f'["{hostile}"]'), PODS), "WORKS"),
    ]
    for setup in setups:
        text = in_text(setup, tmp_path)
        assert text.replace("\n", "").isprintable()
        assert max(map(len, text.split("\n"))) <= WIDTH


STRANGE: tuple[Any, ...] = (None, "", 0, -1, [], {}, "x", True, [None], {"a": 1}, "10.0.0.1", 1 << 70, "\x1b[31m", 1.5)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all fields of an object."""
    fields = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, child in fields:
        yield (*path, step)
        yield from paths(child, (*path, step))


@pytest.mark.parametrize("seed", range(4))
def test_strange_objects_are_explained(seed: int) -> None:
    """Whatever a field contains, the report is valid, and there is a reason unless the Service works."""
    random = Random(seed)
    for setup in random.sample([*BROKEN, *SOUND], 40):
        objects = list(yaml.safe_load_all(setup.yaml))
        for _ in range(random.choice((1, 2, 4))):
            changed = random.choice(objects)
            *parents, last = random.choice(list(paths(changed)) or [("kind",)])
            for step in parents:
                changed = changed[step]
            changed[last] = random.choice(STRANGE)
        facts = Facts("shop/api", "nftables", "node-1", {}, cluster_objects(objects))
        report = explain(facts, random.choice(("", "203.0.113.7", "10.244.2.7", "fd00::12")))
        VALIDATOR.validate(document(report))
        assert (report.reason is None) == (report.verdict == "WORKS")
        lines = list(explanation_lines(report, Style()))
        assert max(map(len, lines)) <= WIDTH
        assert "".join(lines).isprintable()


def test_many_endpoints_are_cut(tmp_path: Path) -> None:
    endpoints = "".join(f"- {{addresses: [10.244.9.{number}], nodeName: node-2}}\n" for number in range(1, 41))
    setup = SetUp("many", cluster(SERVICE, edit(SLICE, "endpoints:\n", f"endpoints:\n{endpoints}"), PODS), "WORKS")
    text = in_text(setup, tmp_path)
    assert "and 22 more endpoints, 22 of them used (-o json has all)" in text
    assert sum("slice" not in line.lower() and "10.244.9." in line for line in text.split("\n")) == 20


def test_the_first_lines_for_people(tmp_path: Path) -> None:
    setup = next(each for each in BROKEN if each.name == "misspelled port name")
    assert in_text(setup, tmp_path).startswith(
        """\
shop/api:http  ClusterIP 10.96.0.82:80/TCP                                                  REJECTED
  x TargetPortUnresolved  targetPort "htp" is not a port name of any of its 2 pods
                          they declare: http=8080, metrics=9090
"""
    )
    assert 'Fix: set spec.ports[0].targetPort to "http"\n' in in_text(setup, tmp_path)


DOCUMENTED = {"api": "web", "10.96.0.82": "10.96.0.80", "10.244.1.5": "10.244.1.7", "10.244.2.5": "10.244.2.9"}
"""The names and addresses of the set-ups, and those of the examples on the page."""


def documented(name: str, folder: Path) -> str:
    """Return what the command prints about a set-up with the names and addresses of the page."""
    setup = next(each for each in (*BROKEN, *SOUND) if each.name == name)
    text = setup.yaml.replace("apiVersion", "<version>")
    for old, new in DOCUMENTED.items():
        text = text.replace(old, new)
    text = text.replace("<version>", "apiVersion")
    return in_text(replace(setup, yaml=text, key="shop/web"), folder)


@pytest.mark.parametrize(
    "name", ["misspelled port name", "externalTrafficPolicy Local", "client outside the source ranges", "NodePort"]
)
def test_documented_output(name: str, tmp_path: Path) -> None:
    assert documented(name, tmp_path).partition("\nNot seen: ")[0] + "\n" in PAGE.read_text()


def test_every_reason_and_note_is_documented() -> None:
    codes = {*get_args(ReasonCode), *get_args(NoteCode)}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)) & codes == codes


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["explain", *arguments])
    return (code, *capsys.readouterr())


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(cluster(SERVICE, SLICE, PODS))
    flags = (f"--objects={path}", "--hostname-override=node-1")
    assert run(capsys, "shop/api", *flags)[0] == 0
    assert run(capsys, "shop/apo", *flags)[0] == 1
    code, output, errors = run(capsys, "a/b/c", *flags)
    assert (code, output) == (2, "")
    assert "NAMESPACE/NAME" in errors
    code, _, errors = run(capsys, "shop/api", "--from=somewhere", *flags)
    assert code == 2
    assert "--from must be an IP address" in errors
    code, _, errors = run(capsys, "shop/api", f"--objects={tmp_path}/missing.yaml")
    assert code == 3
    assert "missing.yaml: cannot be read" in errors
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    code, _, errors = run(capsys, "shop/api", "--kernel=false")
    assert code == 3
    assert "cannot explain shop/api: no source of facts could be read" in errors


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_output_for_programs(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(BROKEN[0].yaml)
    printed = run(capsys, BROKEN[0].key, f"--objects={path}", "--hostname-override=node-1", "-o", output)[1]
    report = json.loads(printed) if output == "json" else yaml.safe_load(printed)
    VALIDATOR.validate(report)
    assert (report["kind"], report["verdict"], report["reason"]["code"]) == (
        "ServiceExplanation",
        BROKEN[0].verdict,
        BROKEN[0].code,
    )


def test_lists_and_directories_of_files(tmp_path: Path) -> None:
    """The output of kubectl get -o json, -o yaml and of the API server, in several files."""
    documents = list(yaml.safe_load_all(cluster(SERVICE, SLICE, PODS)))
    by_kind = {
        kind: [each for each in documents if each["kind"] == kind] for kind in ("Service", "EndpointSlice", "Pod")
    }
    (tmp_path / "services.json").write_text(json.dumps({"kind": "List", "items": by_kind["Service"]}))
    untyped = [{name: value for name, value in each.items() if name != "kind"} for each in by_kind["EndpointSlice"]]
    (tmp_path / "slices.json").write_text(json.dumps({"kind": "EndpointSliceList", "items": untyped}))
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump({"kind": "PodList", "items": by_kind["Pod"]}))
    options = parse(["explain", "shop/api", f"--objects={tmp_path}", "--hostname-override=node-1"])
    report = explain(gather(options, configure(options)[0], "shop/api"))
    assert report.verdict == "WORKS"
    assert report.unseen == ("Nodes, NetworkPolicies (not in the files)",)
