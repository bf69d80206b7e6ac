"""`kproxy apply` on a fresh node programs, chain for chain, what kube-proxy programmed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.types import Family
from tests.lab.namespace import Namespace
from tests.recordings import GOLDEN, SCENARIOS, State, comparable, recorded

KPROXY = str(Path(sys.executable).with_name("kproxy"))
PREFIXES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A namespace with the addresses of the recorded node."""
    namespace = Namespace("node-1")
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["ip", "address", "add", "10.99.0.2/24", "dev", "lo"])
    namespace.run(["ip", "address", "add", "fd00:99::2/64", "dev", "lo", "nodad"])
    yield namespace
    namespace.close()


def apply(node: Namespace, scenario: str) -> None:
    folder = str(GOLDEN / scenario)
    node.run([KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}"])


def held(node: Namespace, family: Family) -> State:
    return comparable(node.run([f"{PREFIXES[family]}-save"]).stdout.splitlines())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_apply_programs_what_kube_proxy_programmed(node: Namespace, scenario: str) -> None:
    apply(node, scenario)
    for family in Family:
        assert held(node, family) == recorded(scenario, family)


@pytest.mark.parametrize("scenario", ["random-11", "dual-stack"])
def test_apply_takes_over_what_kube_proxy_left(node: Namespace, scenario: str) -> None:
    node.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
    for family, prefix in PREFIXES.items():
        name = "ip6tables-save.txt" if family is Family.IPV6 else "iptables-save.txt"
        node.run([f"{prefix}-restore"], (GOLDEN / "random-12" / name).read_text())
    apply(node, scenario)
    for family in Family:
        assert held(node, family) == recorded(scenario, family)


def test_canaries_are_in_every_table(node: Namespace) -> None:
    apply(node, "clusterip")
    for prefix in PREFIXES.values():
        for table in ("mangle", "nat", "filter"):
            assert ":KUBE-PROXY-CANARY -" in node.run([f"{prefix}-save", "-t", table]).stdout


@pytest.mark.parametrize("family", Family)
def test_rendered_text_programs_the_same(node: Namespace, family: Family) -> None:
    folder = str(GOLDEN / "random-13")
    argv = [
        KPROXY,
        "render",
        f"--config={folder}/config.json",
        f"--objects={folder}",
        f"--family={family.value.lower()}",
    ]
    text = node.run(argv).stdout
    node.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
    node.run([f"{PREFIXES[family]}-restore", "--noflush"], text)
    assert held(node, family) == recorded("random-13", family)
