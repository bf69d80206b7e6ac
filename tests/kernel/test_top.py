"""`kproxy top` on a real node: it counts real connections, and the counters survive what happens to other Services."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from kproxy.diagnose.report import schema
from kproxy.diagnose.top import Top
from tests.lab.client import Answered, complete_request, open_connection, send_request
from tests.lab.continuous_requests import ContinuousRequests
from tests.lab.iptables import add_counters, link_programs, missing_variant, programs_of
from tests.lab.modes import BOTH_MODES, affinity_clients, mode_flag
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY, Daemon, apply
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.lab.web_service import CLUSTER_IPS, NODE_PORT, WebService
from tests.recordings import GOLDEN

NOBODY = 65534
OTHER_IPS = {4: "10.96.0.81", 6: "fd00:10:96::81"}
WEB, OTHER = ("demo", "web", "main"), ("demo", "other", "main")
VERSIONS = (4, 6)
CONFIGURATION = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nkproxy: {settings}\n"


class CountingNode:
    """A node with the Services `web` (ClusterIP and NodePort) and `other`, in one mode."""

    def __init__(self, lab: Lab, web: WebService, folder: Path, mode: str) -> None:
        self.lab, self.web = lab, web
        self.pods = [web.pod(1), web.pod(2)]
        self._config = folder / "config.yaml"
        self._flags = (f"--config={self._config}", mode_flag(mode))
        self.log = folder / "kproxy.log"
        self.configure("{connectionCounters: true}")

    def configure(self, settings: str) -> None:
        self._config.write_text(CONFIGURATION.format(settings=settings))

    def write(self, *, other: int = 1, **spec: Any) -> None:
        """Write the objects; `other` is the number of endpoints of the Service `other`."""
        own = self.web.service("web", *CLUSTER_IPS.values(), **({"type": "NodePort"} | spec))
        other_service = self.web.service("other", *OTHER_IPS.values())
        slices = [*self.web.slices("web", self.pods), *self.web.slices("other", self.pods[:other])]
        self.web.write([own, other_service, *slices])

    def apply(self) -> None:
        apply(self.lab, self.web.folder, *self._flags)

    def daemon(self, *flags: str) -> Daemon:
        return Daemon(self.lab, self.web.folder, self.log, *self._flags, *flags)

    def connect(self, version: int, number: int, address: str, port: int = 80) -> Counter[str]:
        """Make connections, and return how many reached each pod."""
        outcomes = [send_request(self.web.client, address, port) for _ in range(number)]
        assert all(isinstance(each, Answered) for each in outcomes), outcomes
        return Counter(
            next(pod.address(version) for pod in self.pods if pod.name == each.pod)
            for each in outcomes
            if isinstance(each, Answered)
        )

    def command(self, *arguments: str, user: int = 0) -> subprocess.CompletedProcess[str]:
        prefix = ("setpriv", f"--reuid={user}", "--clear-groups") if user else ()
        return self.lab.node.namespace.run([*prefix, KPROXY, "top", *arguments], check=False)

    def top(self, *arguments: str) -> dict[str, Any]:
        done = self.command("-o", "json", *arguments)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        Draft202012Validator(schema(Top)).validate(found)
        return found

    def counted(self) -> dict[tuple[str, str, str], int]:
        return {(each["namespace"], each["service"], each["port"]): each["connections"] for each in self.services()}

    def services(self) -> list[dict[str, Any]]:
        services: list[dict[str, Any]] = self.top("--endpoints")["services"]
        return services

    def addresses(self, kind: str, name: str = "web") -> dict[str, int]:
        """Return the connections of each endpoint or frontend of a Service."""
        (found,) = (each for each in self.services() if each["service"] == name)
        return {each["address"]: each["connections"] for each in found[kind]}


@pytest.fixture
def counting(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> CountingNode:
    folder = tmp_path / "objects"
    folder.mkdir()
    return CountingNode(lab, WebService(lab, servers, folder, "TCP"), tmp_path, mode)


def with_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@BOTH_MODES
def test_connections_are_counted_exactly(counting: CountingNode, mode: str) -> None:
    counting.write()
    counting.apply()
    assert counting.counted().get(WEB, 0) == 0
    endpoints: Counter[str] = Counter()
    frontends: dict[str, int] = {}
    for version in VERSIONS:
        node = counting.lab.node.address(version)
        reached = counting.connect(version, 7 + version, CLUSTER_IPS[version])
        reached += counting.connect(version, 5 + version, node, NODE_PORT)
        counting.connect(version, version, OTHER_IPS[version])
        endpoints.update({with_port(address, 8080): number for address, number in reached.items()})
        frontends[f"{with_port(CLUSTER_IPS[version], 80)}/TCP"] = 7 + version
    frontends[f"NodePort {NODE_PORT}/TCP"] = 5 * 2 + 4 + 6
    assert counting.counted() == {WEB: sum(frontends.values()), OTHER: 10}
    assert {each: number for each, number in counting.addresses("endpoints").items() if number} == endpoints
    assert counting.addresses("frontends") == (frontends if mode == "nftables" else {})


@BOTH_MODES
def test_counters_survive_an_update_of_another_service_and_a_restart(counting: CountingNode, mode: str) -> None:
    counting.write()
    with counting.daemon() as daemon:
        daemon.wait_until_synced()
        for version in VERSIONS:
            counting.connect(version, 5, CLUSTER_IPS[version])
        before = counting.addresses("endpoints")
        counting.write(other=2)
        wait_until(lambda: len(counting.addresses("endpoints", "other")) == 4, "the other Service has changed")
        assert (counting.counted()[WEB], counting.addresses("endpoints")) == (10, before)
        daemon.terminate()
    with counting.daemon() as daemon:
        daemon.wait_until_synced()
        assert (counting.counted()[WEB], counting.addresses("endpoints")) == (10, before)
        assert "replacing" not in counting.log.read_text()


@pytest.mark.parametrize("mode", ["nftables"])
def test_an_endpoint_that_stays_keeps_its_count(counting: CountingNode, mode: str) -> None:
    counting.pods = counting.pods[:1]
    counting.write()
    counting.apply()
    counting.connect(4, 3, CLUSTER_IPS[4])
    counting.pods.append(counting.web.pod(3))
    counting.write()
    counting.apply()
    assert counting.addresses("endpoints")[f"{counting.pods[0].address()}:8080"] == 3


@pytest.mark.parametrize("mode", ["nftables"])
def test_switching_the_setting_converts_the_table_and_keeps_connections(counting: CountingNode, mode: str) -> None:
    counting.configure("{connectionCounters: false}")
    counting.write()
    counting.apply()
    missing = counting.command()
    assert missing.returncode == 3
    assert missing.stderr == (
        "kproxy: the IPv4 table kube-proxy has no counters; set kproxy.connectionCounters: true in the configuration "
        "of kproxy\n"
    )
    client = counting.web.client
    for setting in ("true", "false", "true"):
        counting.configure(f"{{connectionCounters: {setting}}}")
        established = [open_connection(client, CLUSTER_IPS[version], 80) for version in VERSIONS]
        with ContinuousRequests(lambda: send_request(client, CLUSTER_IPS[6], 80)) as requests:
            requests.take(10)
            counting.apply()
            requests.take(10)
        assert all(isinstance(each, Answered) for each in requests.outcomes)
        for connection in established:
            with connection:
                assert isinstance(complete_request(connection), Answered)
        assert counting.command().returncode == (0 if setting == "true" else 3)
        if setting == "true":
            before = counting.counted()[WEB]
            counting.connect(4, 2, CLUSTER_IPS[4])
            assert counting.counted()[WEB] == before + 2


@BOTH_MODES
def test_the_comparison_finds_no_drift_because_of_counters(counting: CountingNode, mode: str) -> None:
    counting.write()
    with counting.daemon("--v=4") as daemon:
        daemon.wait_until_synced()
        counting.connect(4, 3, CLUSTER_IPS[4])
        # A foreign change elsewhere makes kproxy compare its own rules with what it has programmed.
        counting.lab.node.namespace.run(["nft", "add", "table", "ip", "stranger"])
        counting.write(other=2)
        wait_until(lambda: len(counting.addresses("endpoints", "other")) == 4, "the other Service has changed")
        status = json.loads(counting.lab.node.namespace.run([KPROXY, "status", "-o", "json"]).stdout)
        assert [each["repairs"] for each in status["daemon"]["families"]] == [0, 0]
        assert counting.counted()[WEB] == 3
    assert "another process changed" not in counting.log.read_text()


@pytest.mark.parametrize("mode", ["nftables"])
def test_services_with_session_affinity(counting: CountingNode, mode: str) -> None:
    counting.write(sessionAffinity="ClientIP")
    counting.apply()
    counting.connect(4, 3, CLUSTER_IPS[4])
    assert counting.counted()[WEB] == 3
    assert any(affinity_clients(counting.lab.node.namespace, "ip").values())
    assert "not counted because of session affinity" in counting.command("demo/web").stdout


@BOTH_MODES
def test_metric_has_a_limited_number_of_series(counting: CountingNode, mode: str) -> None:
    counting.configure("{connectionCounters: true, serviceConnectionMetrics: 2}")
    counting.write()

    def read_page() -> str:
        with urlopen("http://127.0.0.1:10249/metrics", timeout=HANG_GUARD) as response:
            page: bytes = response.read()
        return page.decode()

    def scrape() -> dict[str, float]:
        page = counting.lab.node.namespace.call(read_page)
        return {
            sample.labels["namespace"] + "/" + sample.labels["service"] + ":" + sample.labels["port"]: sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "kproxy_service_connections_total"
        }

    with counting.daemon() as daemon:
        daemon.wait_until_synced()
        counting.connect(4, 3, CLUSTER_IPS[4])
        counting.connect(6, 2, CLUSTER_IPS[6])
        counting.connect(4, 1, OTHER_IPS[4])
        wait_until(lambda: scrape() == {"demo/web:main": 5, "/:": 1}, "the connections are counted")
        counting.connect(4, 1, CLUSTER_IPS[4])
        counting.connect(6, 2, OTHER_IPS[6])
        wait_until(lambda: scrape() == {"demo/web:main": 6, "/:": 3}, "the new connections are counted")


@BOTH_MODES
def test_text(counting: CountingNode, mode: str) -> None:
    counting.write()
    counting.apply()
    counting.connect(4, 2, CLUSTER_IPS[4])
    lines = counting.command("--sort=connections", "-n", "1").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["SERVICE", "CONNECTIONS"],
        ["demo/web:main", "2"],
        ["and", "1", "more"],
        ["all", "2"],
    ]
    one = counting.command("demo/other").stdout
    assert "  to 10.244.1.1:8080" in one
    assert ("  from 10.96.0.81:80/TCP" in one) == (mode == "nftables")
    assert "demo/web" not in one
    rates = counting.command("--interval=0.05").stdout.splitlines()
    assert rates[0].split() == ["SERVICE", "CONNECTIONS", "RATE"]
    assert rates[-1].split()[-1] == "0.0/s"
    unknown = counting.command("demo/nope")
    assert unknown.returncode == 1
    assert "no connections of Service demo/nope are counted" in unknown.stderr


@BOTH_MODES
def test_watch_shows_new_connections(counting: CountingNode, mode: str, tmp_path: Path) -> None:
    counting.write()
    counting.apply()
    output = tmp_path / "output.yaml"

    def reports() -> list[dict[str, Any]]:
        *complete, _ = output.read_text().split("apiVersion: ")[1:] or [""]
        return [yaml.safe_load(f"apiVersion: {each}") for each in complete]

    with output.open("w") as file:
        process = counting.lab.node.namespace.popen([KPROXY, "top", "-w", "--interval=0.05", "-o", "yaml"], file)
    try:
        wait_until(reports, "a first report")
        counting.connect(4, 4, CLUSTER_IPS[4])
        wait_until(lambda: any(each["connections"] == 4 for each in reports()), "the connections are counted")
        new = sum(each["rate"] * each["seconds"] for each in reports())
        assert round(new) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_GUARD) in {0, 130}
    finally:
        process.kill()


@BOTH_MODES
def test_only_root_may_read_the_counters(counting: CountingNode, mode: str) -> None:
    counting.write()
    counting.apply()
    done = counting.command(user=NOBODY)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("kproxy: only root may read the counters")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", ["nftables"])
def test_node_without_rules(counting: CountingNode, mode: str) -> None:
    done = counting.command()
    assert done.returncode == 3
    assert done.stderr.startswith("kproxy: this network namespace has no rules of kproxy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["web"], "the Service must be given as NAMESPACE/SERVICE, not 'web'"),
        (["--sort=rate"], "--sort=rate needs --watch or --interval=SECONDS"),
        (["--interval=0"], "--interval must be a positive number of seconds, not '0'"),
        (["-n", "0"], "--number must be a positive integer, not '0'"),
    ],
)
@pytest.mark.parametrize("mode", ["nftables"])
def test_invalid_usage(counting: CountingNode, mode: str, arguments: list[str], message: str) -> None:
    done = counting.command(*arguments)
    assert (done.returncode, done.stderr) == (2, f"kproxy: {message}\n")


def test_the_variant_of_iptables_that_the_host_uses_is_read(namespace: Namespace, variant: str, tmp_path: Path) -> None:
    for each in ("nft", "legacy"):
        if reason := missing_variant(each, namespace):
            pytest.skip(reason)
        (tmp_path / each).mkdir()
        link_programs(programs_of(each), tmp_path / each)
    add_counters(namespace)
    for family in ("iptables", "ip6tables"):
        rules = (GOLDEN / "dual-stack" / f"{family}-save.txt").read_text()
        counted = re.sub(r"(?m)^(-A KUBE-SEP-.* --to-destination)", r"[7:420] \1", rules)
        namespace.run([f"{family}-{variant}-restore", "-c"], counted)
    done = namespace.run(["env", f"KPROXY_IPTABLES={tmp_path}", KPROXY, "top", "--endpoints", "-o", "json"])
    services = json.loads(done.stdout)["services"]
    assert len(services) > 1
    counts = {each["address"]: each["connections"] for service in services for each in service["endpoints"]}
    assert any(address.startswith("[") for address in counts)
    # ip6tables-nft-restore 1.8.9 ignores the counters in its input.
    assert {count for address, count in counts.items() if not address.startswith("[")} == {7}


@pytest.mark.parametrize("mode", ["nftables"])
def test_elements_of_strangers_are_omitted(counting: CountingNode, mode: str) -> None:
    counting.write()
    counting.apply()
    commands = (
        "add element ip kube-proxy service-ips { 10.9.9.9 . icmp . 80 : drop }",
        'add element ip kube-proxy service-ips { 10.9.9.9 . icmp . 81 comment "demo/strange" : drop }',
        "add element ip kube-proxy service-endpoints { 10.9.9.9 . tcp . 80 . 0 : 10.1.1.1 . 80 }",
        "add element ip kube-proxy service-ips { * : drop }",
    )
    for each in commands:
        counting.lab.node.namespace.run(["nft", each])
    assert counting.counted() == {WEB: 0, OTHER: 0, ("demo", "strange", ""): 0}
