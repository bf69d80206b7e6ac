"""`kproxy diff` and `kproxy apply --dry-run` on a real node, in both modes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.app import dry_run
from kproxy.app.desired_state import assumed_contexts, from_files
from kproxy.config import Config
from kproxy.diagnose.difference import DryRun, RulesDifference
from kproxy.diagnose.difference_objects import ObjectsDifference
from kproxy.diagnose.report import schema
from kproxy.host.ctnetlink import count_flows
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.elements import service_key
from kproxy.nftables.trial import TrialCommit
from tests.kernel.test_iptables_isolation import without_recent
from tests.kernel.test_nftables_quarantine import CorruptingEncoder
from tests.lab.iptables import link_programs, programs_of
from tests.lab.modes import BOTH_MODES, IptablesRules, mode_flag
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY, Daemon
from tests.lab.topology import Lab

OBJECTS = """\
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 10.99.0.2}, {type: InternalIP, address: "fd00:99::2"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80, protocol: TCP, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.5], nodeName: node-1}, {addresses: [10.244.2.6], nodeName: node-2}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  sessionAffinity: ClientIP
  ports: [{name: sql, port: 5432, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 5432, protocol: TCP}]
endpoints: [{addresses: [10.244.2.9], nodeName: node-2}]
"""
NOBODY = 65534
Found = tuple[str, str, tuple[str, ...]]
"""The change, the kind of the part, and the Services."""


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / "shop.yaml").write_text(OBJECTS)
    return folder


def kproxy(node: Namespace, *arguments: str, user: int = 0) -> subprocess.CompletedProcess[str]:
    prefix = ("setpriv", f"--reuid={user}", "--clear-groups") if user else ()
    return node.run([*prefix, KPROXY, *arguments], check=False)


def flags(objects: Path, mode: str) -> list[str]:
    return [f"--objects={objects}", *FLAGS, mode_flag(mode)]


def report(node: Namespace, kind: type[Any], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a command, and return its exit code and its report, which must match its schema."""
    done = kproxy(node, *arguments, "-o", "json")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator(schema(kind)).validate(found)
    return done.returncode, found


def differences(node: Namespace, objects: Path, mode: str) -> set[Found]:
    code, found = report(node, RulesDifference, "diff", *flags(objects, mode))
    listed = [each for family in found["families"] for each in family["differences"]]
    assert code == int(bool(listed))
    assert found["identical"] is not bool(listed)
    return {(each["change"], each["kind"], tuple(each["services"])) for each in listed}


@BOTH_MODES
def test_no_difference_after_apply(node: Namespace, objects: Path, mode: str, nft: None) -> None:
    before = differences(node, objects, mode)
    assert {change for change, _, _ in before} == {"missing"}
    assert kproxy(node, "apply", *flags(objects, mode)).returncode == 0
    assert differences(node, objects, mode) == set()
    text = kproxy(node, "diff", *flags(objects, mode))
    assert text.stdout.endswith(": no difference\n")


@BOTH_MODES
def test_rules_of_the_other_mode_are_extra(node: Namespace, objects: Path, mode: str, nft: None) -> None:
    other = "nftables" if mode == "iptables" else "iptables"
    assert kproxy(node, "apply", *flags(objects, other)).returncode == 0
    assert differences(node, objects, mode) == {("missing", "table", ()), ("extra", "table", ())}
    expected = "nftables table kube-proxy" if mode == "iptables" else "chains of iptables mode"
    assert f"{expected}: belongs to the other proxy mode" in kproxy(node, "diff", *flags(objects, mode)).stdout
    assert kproxy(node, "apply", *flags(objects, mode)).returncode == 0
    assert differences(node, objects, mode) == set()


def test_damaged_rules_of_iptables_mode_are_named_with_their_service(node: Namespace, objects: Path) -> None:
    assert kproxy(node, "apply", *flags(objects, "iptables")).returncode == 0
    saved = IptablesRules(node).text().splitlines()
    jump = next(line for line in saved if "shop/web:http cluster IP" in line and line.startswith("-A KUBE-SERVICES"))
    endpoint = next(line.split()[1] for line in saved if "--to-destination 10.244.2.9:5432" in line)
    node.run(["iptables-restore", "--noflush"], f"*nat\n{jump.replace('-A', '-D', 1)}\nCOMMIT\n")
    assert differences(node, objects, "iptables") == {("missing", "rule", ("shop/web",))}
    node.run(["iptables", "-t", "nat", "-A", endpoint, "-j", "RETURN"])
    assert differences(node, objects, "iptables") == {
        ("missing", "rule", ("shop/web",)),
        ("extra", "rule", ("shop/db",)),
    }
    node.run(["iptables-restore", "--noflush"], f"*nat\n{jump.replace('--dport 80', '--dport 81')}\nCOMMIT\n")
    node.run(["iptables", "-t", "nat", "-N", "KUBE-SVC-AAAAAAAAAAAAAAAA"])
    node.run(["iptables", "-t", "filter", "-D", "INPUT", "-j", "KUBE-FIREWALL"])
    assert differences(node, objects, "iptables") == {
        ("changed", "rule", ("shop/web",)),
        ("extra", "rule", ("shop/db",)),
        ("extra", "chain", ()),
        ("missing", "rule", ()),
    }
    text = kproxy(node, "diff", *flags(objects, "iptables")).stdout
    assert f"+ {jump}"[:80] in text
    assert max(map(len, text.splitlines())) <= 100


def test_damaged_elements_of_nftables_mode_are_named_with_their_service(
    node: Namespace, objects: Path, nft: None
) -> None:
    assert kproxy(node, "apply", *flags(objects, "nftables")).returncode == 0
    table = ("ip", "kube-proxy")
    node.run(["nft", "delete", "element", *table, "service-ips", "{ 10.96.0.10 . tcp . 80 }"])
    assert differences(node, objects, "nftables") == {("missing", "element", ("shop/web",))}
    node.run(
        ["nft", "add", "element", *table, "service-ips", '{ 10.96.0.77 . tcp . 80 comment "old/one:http" : drop }']
    )
    node.run(["nft", "delete", "element", *table, "service-ips", "{ 10.96.0.20 . tcp . 5432 }"])
    node.run(
        ["nft", "add", "element", *table, "service-ips", '{ 10.96.0.20 . tcp . 5432 comment "shop/db:sql" : drop }']
    )
    assert differences(node, objects, "nftables") == {
        ("missing", "element", ("shop/web",)),
        ("extra", "element", ("old/one",)),
        ("changed", "element", ("shop/db",)),
    }
    listed = node.run(["nft", "list", "table", *table]).stdout
    chain = next(line.split()[1] for line in listed.splitlines() if "chain service-" in line and "shop/db" in line)
    node.run(["nft", "add", "rule", *table, chain, "counter"])
    assert ("changed", "chain", ("shop/db",)) in differences(node, objects, "nftables")
    node.run(["nft", "add", "rule", *table, "services", "ip", "daddr", "192.0.2.1", "drop"])
    text = kproxy(node, "diff", *flags(objects, "nftables")).stdout
    assert "changed chain services\n    - ip daddr 192.0.2.1 drop\n" in text
    node.run(["nft", "delete", "table", *table])
    assert differences(node, objects, "nftables") == {("missing", "table", ())}


@BOTH_MODES
def test_the_objects_of_the_daemon_are_compared(lab: Lab, objects: Path, tmp_path: Path, mode: str, nft: None) -> None:
    node = lab.node.namespace
    with Daemon(lab, objects, tmp_path / "kproxy.log", mode_flag(mode)) as daemon:
        daemon.wait_until_synced()
        code, found = report(node, RulesDifference, "diff")
        assert (code, found["source"], found["mode"], found["services"]) == (0, "the daemon", mode, 2)
        changed = tmp_path / "changed.yaml"
        changed.write_text(OBJECTS.replace("10.244.2.6", "10.244.2.7"))
        code, found = report(node, ObjectsDifference, "diff", f"--against={changed}")
        assert code == 1
        (web,) = found["services"]
        assert (web["service"], web["endpointsAdded"]) == ("shop/web", ["10.244.2.7:8080/TCP"])
        assert web["endpointsRemoved"] == [{"endpoint": "10.244.2.6:8080", "protocol": "TCP", "connections": 0}]
    assert kproxy(node, "diff").returncode == 3


def test_connections_of_a_lost_endpoint_are_counted(node: Namespace, objects: Path, tmp_path: Path) -> None:
    """The flow is an entry that `conntrack` creates as if a client had used the Service."""
    changed = tmp_path / "changed.yaml"
    changed.write_text(OBJECTS.replace("10.244.2.6", "10.244.2.7"))
    assert kproxy(node, "apply", *flags(objects, "iptables")).returncode == 0
    states = {"ESTABLISHED": 40001, "TIME_WAIT": 40002}
    for state, port in states.items():
        original = ["-s", "10.99.0.9", "-d", "10.96.0.10", "--sport", str(port), "--dport", "80"]
        reply = ["-r", "10.244.2.6", "-q", "10.99.0.9", "--reply-port-src", "8080", "--reply-port-dst", str(port)]
        node.run(["conntrack", "-I", "-p", "tcp", *original, *reply, "--state", state, "-t", "120"])
    found = report(node, ObjectsDifference, "diff", *flags(objects, "iptables"), f"--against={changed}")[1]
    lost = [each for service in found["services"] for each in service["endpointsRemoved"]]
    assert lost == [{"endpoint": "10.244.2.6:8080", "protocol": "TCP", "connections": 1}]


def dumps(node: Namespace) -> str:
    """Return all rules of the node, including those that are not kproxy's.

    With iptables-legacy, only rules and chains count: the kernel creates the built-in chains when a table is read.
    """
    saved = [node.run([f"{program}-save"]).stdout for program in ("iptables-legacy", "ip6tables-legacy")]
    lines = [line for text in saved for line in text.splitlines() if line.startswith("-A") or " - [" in line]
    return "\n".join([*lines, node.run(["nft", "list", "ruleset"]).stdout])


@BOTH_MODES
@pytest.mark.parametrize("applied", [False, True], ids=["empty", "applied"])
def test_dry_run_changes_nothing(node: Namespace, objects: Path, mode: str, applied: bool, nft: None) -> None:
    if applied:
        assert kproxy(node, "apply", *flags(objects, mode)).returncode == 0
    node.run(["nft", "add", "table", "inet", "other"])
    (objects / "shop.yaml").write_text(OBJECTS.replace("port: 80,", "port: 81,"))
    before = dumps(node)
    code, found = report(node, DryRun, "apply", *flags(objects, mode), "--dry-run")
    assert dumps(node) == before
    assert (code, found["accepted"], found["identical"], found["rejected"]) == (0, True, False, [])
    assert {(each["checkedBy"], each["problem"]) for each in found["trials"]} == {("kernel", "")}
    services = {name for family in found["families"] for each in family["differences"] for name in each["services"]}
    if applied:
        assert services == {"shop/web"}
    assert kproxy(node, "apply", *flags(objects, mode)).returncode == 0
    text = kproxy(node, "apply", *flags(objects, mode), "--dry-run")
    assert (text.returncode, text.stdout.splitlines()[-1]) == (0, "  nothing would change")


@pytest.fixture
def programs(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the programs of a variant, which is first in PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    link_programs(programs_of(variant), folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(folder / "lock"))
    return folder


def test_dry_run_names_a_service_that_the_kernel_rejects_in_iptables_mode(
    node: Namespace, objects: Path, programs: Path, variant: str
) -> None:
    without_recent(programs, variant)
    code, found = report(node, DryRun, "apply", *flags(objects, "iptables"), "--dry-run")
    assert (code, found["accepted"]) == (1, False)
    ((family, service),) = {(each["family"], each["service"]) for each in found["rejected"]}
    assert (family, service) == ("IPv4", "shop/db")
    text = kproxy(node, "apply", *flags(objects, "iptables"), "--dry-run")
    assert text.returncode == 1
    assert "x IPv4: shop/db: " in text.stdout


@pytest.mark.parametrize("applied", [False, True], ids=["new table", "existing table"])
def test_dry_run_names_a_service_that_the_kernel_rejects_in_nftables_mode(
    node: Namespace, objects: Path, applied: bool, nft: None
) -> None:
    if applied:
        assert kproxy(node, "apply", *flags(objects, "nftables")).returncode == 0
        (objects / "shop.yaml").write_text(OBJECTS.replace("port: 80,", "port: 81,"))
    config = Config(mode="nftables", hostname_override="node-1")
    before = dumps(node)
    refused = service_key("10.96.0.10", "TCP", 81 if applied else 80)

    class RefusedCommit(TrialCommit):
        def __init__(self, family: Family) -> None:
            super().__init__(family)
            self._encoder = CorruptingEncoder(family)
            self._encoder.refuse = lambda kind, key: kind == names.SERVICE_IPS and key == refused

    def trial() -> dict[str, str]:
        contexts = {Family.IPV4: assumed_contexts(config)[Family.IPV4]}
        state = from_files(config, str(objects), contexts)
        backend = dry_run.nftables_backend(RefusedCommit(Family.IPV4), Family.IPV4)
        found = dry_run._run(backend, state, Family.IPV4)
        assert found.problem == ""
        return dict(found.rejected)

    rejected = node.call(trial)
    assert dumps(node) == before
    assert rejected.keys() == {"shop/web"}
    assert "service-ips" in rejected["shop/web"]


def test_without_a_namespace_only_iptables_checks_the_rules(
    node: Namespace, objects: Path, programs: Path, variant: str
) -> None:
    """In a container without CAP_SYS_ADMIN."""
    bounding = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    command = [*bounding, KPROXY, "apply", *flags(objects, "iptables"), "--dry-run", "-o", "json"]
    before = dumps(node)
    done = node.run(command, check=False)
    assert dumps(node) == before
    assert (done.returncode, json.loads(done.stdout)["rejected"]) == (0, [])
    assert {each["checkedBy"] for each in json.loads(done.stdout)["trials"]} == {"iptables"}
    without_recent(programs, variant)
    done = node.run(command, check=False)
    assert done.returncode == 1
    rejected = [each["service"] for each in json.loads(done.stdout)["rejected"]]
    problems = [each["problem"] for each in json.loads(done.stdout)["trials"] if each["problem"]]
    # iptables-legacy does not tell which rule is wrong.
    assert (rejected, len(problems)) == ((["shop/db"], 0) if variant == "nft" else ([], 1))


@pytest.mark.parametrize(("protocol", "name"), [("udp", "UDP"), ("tcp", "TCP")])
def test_flows_of_each_family_are_counted(node: Namespace, protocol: str, name: str) -> None:
    state = ["--state", "ESTABLISHED"] if protocol == "tcp" else []
    for client, frontend, endpoint in (
        ("10.99.0.9", "10.96.0.10", "10.244.2.6"),
        ("fd00:99::9", "fd00:96::10", "fd00:244::6"),
    ):
        original = ["-s", client, "-d", frontend, "--sport", "4000", "--dport", "80"]
        reply = ["-r", endpoint, "-q", client, "--reply-port-src", "8080", "--reply-port-dst", "4000"]
        node.run(["conntrack", "-I", "-p", protocol, *original, *reply, *state, "-t", "120"])
    assert node.call(lambda: count_flows(Family.IPV4)) == {(name, "10.96.0.10:80", "10.244.2.6:8080"): 1}
    assert node.call(lambda: count_flows(Family.IPV6)) == {(name, "[fd00:96::10]:80", "[fd00:244::6]:8080"): 1}


def test_dry_run_without_a_mode_is_that_of_iptables_mode(node: Namespace, objects: Path) -> None:
    code, found = report(node, DryRun, "apply", *flags(objects, ""), "--dry-run")
    assert (code, found["mode"]) == (0, "iptables")
    assert "KUBE-SERVICES" not in node.run(["iptables-save"]).stdout


@BOTH_MODES
def test_unprivileged_users_get_one_clear_line(node: Namespace, objects: Path, mode: str) -> None:
    for command in (["diff"], ["apply", "--dry-run"]):
        done = kproxy(node, *command, *flags(objects, mode), user=NOBODY)
        assert done.returncode == 3
        assert done.stdout == ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("kproxy:")]
        assert len(errors) == 1
        assert "missing capability CAP_NET_ADMIN" in errors[0]
    with TemporaryDirectory() as folder:  # the user has no access to the folder of the test
        Path(folder).chmod(0o755)
        before, after = Path(folder, "before.yaml"), Path(folder, "after.yaml")
        before.write_text(OBJECTS)
        after.write_text(OBJECTS.replace("10.244.2.6", "10.244.2.7"))
        done = kproxy(node, "diff", *flags(before, mode), f"--against={after}", user=NOBODY)
    assert done.returncode == 1, done.stderr
    assert "- endpoint 10.244.2.6:8080/TCP\n" in done.stdout
