"""The image with the privileges that the manifests give it: two capabilities, a read-only root, no shell."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.apiserver import ApiServer
from tests.apiserver.objects import endpoint_slice, node, service
from tests.deploy.image_node import ImageNode
from tests.deploy.oci import SECCOMP, oom_score
from tests.deploy.rendered import Object, container
from tests.deploy.tls import server_tls
from tests.lab.waiting import HANG_GUARD, wait_until

VARIABLE = "KPROXY_IMAGE_ROOT"
HEALTHZ, METRICS = 10256, 10249
MIB = 1024 * 1024

Make = Callable[[str], ImageNode]


def missing() -> str:
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} is not set: `make image-test` builds the image and runs these tests"
    if shutil.which("runc") is None:
        return "runc not found: install it with `apt-get install runc`"
    if not SECCOMP.exists():
        return f"{SECCOMP} not found: install it with `apt-get install golang-github-containers-common`"
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def root() -> Path:
    return Path(os.environ[VARIABLE])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tokens=["secret"], tls=server_tls(tmp_path, "127.0.0.1")) as server:
        server.create(node("node-1"))
        server.create(service("web", "10.96.7.1", type="NodePort"))
        server.create(endpoint_slice("web-x", "web", ["10.244.1.1", "10.244.2.1"]))
        yield server


@pytest.fixture
def make(kernel: None, root: Path, tmp_path: Path, server: ApiServer) -> Iterator[Make]:
    hosts: list[ImageNode] = []

    def make(mode: str) -> ImageNode:
        hosts.append(ImageNode(root, tmp_path, server, mode))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def prepare(host: ImageNode) -> None:
    """Run the init container of the Pod to completion."""
    process = host.start(container("replace-kube-proxy", "sysctls"))
    assert process.wait(HANG_GUARD) == 0, host.log()


def problems(host: ImageNode) -> list[str]:
    """Return warnings and errors in the log, except about an OOM score that this process may not set."""
    logged = [line for line in host.log().splitlines() if re.search(r"^[WEF]\d{4} |rror:|Traceback", line)]
    return [line for line in logged if oom_score() or "oomScoreAdj stays as it is" not in line]


def without(spec: Object, capability: str) -> Object:
    """Return a container without one capability."""
    context = spec["securityContext"]
    kept = [name for name in context["capabilities"]["add"] if name != capability]
    return spec | {"securityContext": context | {"capabilities": {"drop": ["ALL"], "add": kept}}}


RULES = {
    "iptables": ["iptables-nft-save"],
    "legacy": ["iptables-legacy-save"],
    "nftables": ["nft", "list", "table", "ip", "kube-proxy"],
}


def ready(make: Make, kind: str) -> ImageNode:
    """Return a node with its kernel parameters set. In the kind `legacy`, the kubelet uses iptables-legacy."""
    host = make("nftables" if kind == "nftables" else "iptables")
    if kind == "legacy":
        host.namespace.run(["iptables-legacy", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT"])
    prepare(host)
    return host


@pytest.mark.parametrize("kind", RULES)
def test_daemon_programs_the_node_and_reports_healthy(make: Make, kind: str) -> None:
    host = ready(make, kind)
    spec = container("replace-kube-proxy")
    process = host.start(spec)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert '"healthy":true' in host.until_page(HEALTHZ, spec[probe]["httpGet"]["path"]).replace(" ", "")
    assert host.get(METRICS, "/proxyMode")[1] == ("nftables" if kind == "nftables" else "iptables")
    metrics = host.until_page(METRICS, "/metrics")
    assert "kubeproxy_sync_proxy_rules_last_timestamp_seconds" in metrics
    assert ("kubeproxy_iptables_ct_state_invalid_dropped_packets_total" in metrics) == (kind != "nftables")
    rules = host.namespace.run(RULES[kind]).stdout
    assert "10.244.1.1" in rules
    assert "10.244.2.1" in rules
    for other in set(RULES) - {kind}:
        assert "10.244.1.1" not in host.namespace.run(RULES[other], check=False).stdout
    assert host.stop(process) == 0
    assert problems(host) == []
    assert host.namespace.run(RULES[kind]).stdout.count("10.244.1.1") == rules.count("10.244.1.1")


def test_init_container_sets_kernel_parameters(make: Make) -> None:
    host = make("iptables")
    parameters = {
        "net/ipv4/conf/all/route_localnet": "1",
        "net/netfilter/nf_conntrack_tcp_timeout_established": "39600",
    }

    def read() -> dict[str, str]:
        return {name: Path("/proc/sys", name).read_text().strip() for name in parameters}

    assert not host.namespace.call(read).items() & parameters.items()
    prepare(host)
    assert host.namespace.call(read) == parameters
    assert problems(host) == []


def test_udp_conntrack_entries_of_removed_endpoints_are_deleted(make: Make, server: ApiServer) -> None:
    dns = service("dns", "10.96.7.2") | {"spec": {"clusterIP": "10.96.7.2", "ports": [{"port": 53, "protocol": "UDP"}]}}
    server.create(dns)
    both = endpoint_slice("dns-x", "dns", ["10.244.1.9", "10.244.2.9"])
    server.create(both | {"ports": [{"name": "", "port": 53, "protocol": "UDP"}]})
    host = ready(make, "iptables")
    host.start(container("replace-kube-proxy"))
    host.until_page(HEALTHZ, "/healthz")
    flow = "-I -p udp -s 10.244.1.3 -d 10.96.7.2 --sport 999 --dport 53 -r 10.244.2.9 -q 10.244.1.3"
    host.namespace.run(["conntrack", *flow.split(), "--reply-port-src", "53", "--reply-port-dst", "999", "-t", "600"])
    assert "10.244.2.9" in host.namespace.run(["conntrack", "-L"]).stdout
    remaining = endpoint_slice("dns-x", "dns", ["10.244.1.9"])
    server.update(remaining | {"ports": [{"name": "", "port": 53, "protocol": "UDP"}]})
    wait_until(
        lambda: "10.244.2.9" not in host.namespace.run(["conntrack", "-L"]).stdout,
        "the deletion of the conntrack entry",
    )
    assert problems(host) == []


def test_no_kubeconfig_is_needed_in_a_pod(make: Make, tmp_path: Path) -> None:
    host = ready(make, "nftables")
    configuration = tmp_path / "config" / "config.conf"
    configuration.write_text(configuration.read_text().replace("kubeconfig: /var/lib/kube-proxy/kubeconfig.conf", ""))
    host.start(
        container("replace-kube-proxy"),
        KUBERNETES_SERVICE_HOST="127.0.0.1",
        KUBERNETES_SERVICE_PORT=str(host.server_port),
    )
    host.until_page(HEALTHZ, "/healthz")
    assert problems(host) == []


@pytest.mark.parametrize("kind", ["iptables", "nftables"])
def test_daemon_exits_without_net_admin(make: Make, kind: str) -> None:
    host = ready(make, kind)
    process = host.start(without(container("replace-kube-proxy"), "NET_ADMIN"))
    wait_until(lambda: process.poll() is not None, "the exit of kproxy")
    assert "10.244.1.1" not in host.namespace.run(RULES[kind], check=False).stdout
    assert host.log().splitlines()[-1].startswith("kproxy: the capability CAP_NET_ADMIN")


def test_without_net_raw_iptables_legacy_is_not_detected(make: Make) -> None:
    host = ready(make, "legacy")
    host.start(without(container("replace-kube-proxy"), "NET_RAW"))
    host.until_page(HEALTHZ, "/healthz")
    assert "10.244.1.1" not in host.namespace.run(RULES["legacy"]).stdout


def test_memory_is_close_to_the_request_in_the_manifest(make: Make) -> None:
    host = ready(make, "iptables")
    spec = container("replace-kube-proxy")
    host.start(spec)
    host.until_page(HEALTHZ, "/healthz")
    page = host.until_page(METRICS, "/metrics")
    (resident,) = re.findall(r"^process_resident_memory_bytes (\S+)", page, re.MULTILINE)
    requested = int(spec["resources"]["requests"]["memory"].removesuffix("Mi")) * MIB
    print(f"resident: {float(resident) / MIB:.1f} MiB")  # noqa: T201 - the source of the figure in the manifest
    assert requested / 2 <= float(resident) <= requested


def test_image_contains_no_shell_or_build_tools(root: Path) -> None:
    names = {path.name for folder in ("usr/bin", "usr/sbin", "opt/kproxy/bin") for path in (root / folder).iterdir()}
    assert names & {"sh", "bash", "dash", "busybox", "perl", "apt", "dpkg", "pip", "gcc", "cc", "ld"} == set()
    assert {"kproxy", "python3", "nft", "iptables", "ip6tables-restore", "iptables-legacy-save"} <= names


def test_modules_are_compiled_because_the_root_is_read_only(root: Path) -> None:
    package = root / "opt/kproxy/lib/python3.11/site-packages/kproxy"
    compiled = {path.name.split(".")[0] for path in (package / "__pycache__").iterdir()}
    assert compiled == {path.stem for path in package.glob("*.py")}
