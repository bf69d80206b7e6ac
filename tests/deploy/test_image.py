"""The image, run with what the manifests give to it: two capabilities, a root that cannot be written, no shell."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.apiserver import ApiServer
from tests.apiserver.objects import endpoint_slice, node, service
from tests.deploy.image_node import ImageNode, tls
from tests.deploy.oci import SECCOMP, oom_score
from tests.deploy.rendered import Object, container
from tests.lab.waiting import HANG_GUARD, wait_until

VARIABLE = "KPROXY_IMAGE_ROOT"
HEALTHZ, METRICS = 10256, 10249
MIB = 1024 * 1024

Make = Callable[[str], ImageNode]


def missing() -> str:
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} is not set: `make image-test` builds the image and runs these"
    if shutil.which("runc") is None:
        return "runc not found: install it with `apt-get install runc`"
    if not SECCOMP.exists():
        return f"{SECCOMP} not found: install it with `apt-get install golang-github-containers-common`"
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")


@pytest.fixture
def root() -> Path:
    return Path(os.environ[VARIABLE])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tokens=["secret"], tls=tls(tmp_path)) as server:
        server.create(node("node-1"))
        server.create(service("web", "10.96.7.1", type="NodePort"))
        server.create(endpoint_slice("web-x", "web", ["10.244.1.1", "10.244.2.1"]))
        yield server


@pytest.fixture
def make(kernel: None, root: Path, tmp_path: Path, server: ApiServer) -> Iterator[Make]:
    made: list[ImageNode] = []

    def make(mode: str) -> ImageNode:
        made.append(ImageNode(root, tmp_path, server, mode))
        return made[-1]

    yield make
    for each in made:
        each.close()


def prepare(host: ImageNode) -> None:
    """Run the Pod's first container to its end."""
    process = host.start(container("replace-kube-proxy", "sysctls"))
    assert process.wait(HANG_GUARD) == 0, host.log()


def complaints(host: ImageNode) -> list[str]:
    """Return what the daemon does not like, but for what no runc could have given to it here."""
    found = [line for line in host.log().splitlines() if re.search(r"^[WEF]\d{4} |rror:|Traceback", line)]
    return [line for line in found if oom_score() or "oomScoreAdj stays as it is" not in line]


def without(of: Object, capability: str) -> Object:
    context = of["securityContext"]
    kept = [name for name in context["capabilities"]["add"] if name != capability]
    return of | {"securityContext": context | {"capabilities": {"drop": ["ALL"], "add": kept}}}


RULES = {
    "iptables": ["iptables-nft-save"],
    "legacy": ["iptables-legacy-save"],
    "nftables": ["nft", "list", "table", "ip", "kube-proxy"],
}


def ready(make: Make, kind: str) -> ImageNode:
    """Return a node with the parameters set; on one of kind `legacy` the kubelet uses iptables-legacy."""
    host = make("nftables" if kind == "nftables" else "iptables")
    if kind == "legacy":
        host.namespace.run(["iptables-legacy", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT"])
    prepare(host)
    return host


@pytest.mark.parametrize("kind", RULES)
def test_it_programs_the_node_and_says_so(make: Make, kind: str) -> None:
    host = ready(make, kind)
    of = container("replace-kube-proxy")
    process = host.start(of)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert '"healthy":true' in host.until_page(HEALTHZ, of[probe]["httpGet"]["path"]).replace(" ", "")
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
    assert complaints(host) == []
    assert host.namespace.run(RULES[kind]).stdout.count("10.244.1.1") == rules.count("10.244.1.1")


def test_the_first_container_sets_the_kernels_parameters(make: Make) -> None:
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
    assert complaints(host) == []


def test_it_forgets_udp_flows_to_endpoints_that_are_gone(make: Make, server: ApiServer) -> None:
    dns = service("dns", "10.96.7.2") | {"spec": {"clusterIP": "10.96.7.2", "ports": [{"port": 53, "protocol": "UDP"}]}}
    server.create(dns)
    of = endpoint_slice("dns-x", "dns", ["10.244.1.9", "10.244.2.9"])
    server.create(of | {"ports": [{"name": "", "port": 53, "protocol": "UDP"}]})
    host = ready(make, "iptables")
    host.start(container("replace-kube-proxy"))
    host.until_page(HEALTHZ, "/healthz")
    flow = "-I -p udp -s 10.244.1.3 -d 10.96.7.2 --sport 999 --dport 53 -r 10.244.2.9 -q 10.244.1.3"
    host.namespace.run(["conntrack", *flow.split(), "--reply-port-src", "53", "--reply-port-dst", "999", "-t", "600"])
    assert "10.244.2.9" in host.namespace.run(["conntrack", "-L"]).stdout
    left = endpoint_slice("dns-x", "dns", ["10.244.1.9"])
    server.update(left | {"ports": [{"name": "", "port": 53, "protocol": "UDP"}]})
    wait_until(lambda: "10.244.2.9" not in host.namespace.run(["conntrack", "-L"]).stdout, "the flow's end")
    assert complaints(host) == []


def test_in_a_pod_it_needs_no_kubeconfig(make: Make, tmp_path: Path) -> None:
    host = ready(make, "nftables")
    configuration = tmp_path / "config" / "config.conf"
    configuration.write_text(configuration.read_text().replace("kubeconfig: /var/lib/kube-proxy/kubeconfig.conf", ""))
    of = container("replace-kube-proxy")
    host.start(of, KUBERNETES_SERVICE_HOST="127.0.0.1", KUBERNETES_SERVICE_PORT=str(host.server_port))
    host.until_page(HEALTHZ, "/healthz")
    assert complaints(host) == []


@pytest.mark.parametrize("kind", ["iptables", "nftables"])
def test_without_net_admin_it_cannot_work(make: Make, kind: str) -> None:
    host = ready(make, kind)
    process = host.start(without(container("replace-kube-proxy"), "NET_ADMIN"))
    wait_until(lambda: process.poll() is not None, "the end of kproxy")
    assert "10.244.1.1" not in host.namespace.run(RULES[kind], check=False).stdout
    assert host.log().splitlines()[-1].startswith("kproxy: the capability CAP_NET_ADMIN")


def test_without_net_raw_it_does_not_find_what_iptables_legacy_holds(make: Make) -> None:
    host = ready(make, "legacy")
    host.start(without(container("replace-kube-proxy"), "NET_RAW"))
    host.until_page(HEALTHZ, "/healthz")
    assert "10.244.1.1" not in host.namespace.run(RULES["legacy"]).stdout


def test_its_memory_is_what_the_manifest_asks_for(make: Make) -> None:
    host = ready(make, "iptables")
    of = container("replace-kube-proxy")
    host.start(of)
    host.until_page(HEALTHZ, "/healthz")
    page = host.until_page(METRICS, "/metrics")
    (resident,) = re.findall(r"^process_resident_memory_bytes (\S+)", page, re.MULTILINE)
    requested = int(of["resources"]["requests"]["memory"].removesuffix("Mi")) * MIB
    print(f"resident: {float(resident) / MIB:.1f} MiB")  # noqa: T201 - the figure behind the manifest's
    assert requested / 2 <= float(resident) <= requested


def test_there_is_nothing_in_it_to_run_but_what_it_needs(root: Path) -> None:
    names = {path.name for folder in ("usr/bin", "usr/sbin", "opt/kproxy/bin") for path in (root / folder).iterdir()}
    assert names & {"sh", "bash", "dash", "busybox", "perl", "apt", "dpkg", "pip", "gcc", "cc", "ld"} == set()
    assert {"kproxy", "python3", "nft", "iptables", "ip6tables-restore", "iptables-legacy-save"} <= names


def test_its_modules_are_compiled_since_nobody_can_do_that_later(root: Path) -> None:
    package = root / "opt/kproxy/lib/python3.11/site-packages/kproxy"
    compiled = {path.name.split(".")[0] for path in (package / "__pycache__").iterdir()}
    assert compiled == {path.stem for path in package.glob("*.py")}
