"""One Service that the real kernel rejects does not keep the others from being programmed, in iptables mode."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import INVALID_COUNTER, port_hash
from kproxy.iptables.runner import IptablesRunner
from kproxy.iptables.save_restore import MAX_TRANSACTION_RULES, UNLIMITED
from kproxy.model.context import Context
from kproxy.model.drift import Part, Touched
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.inprocess import EMPTY_LISTS, SingleFamilyProxy
from tests.lab.iptables import add_counters, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.recordings import State, comparable

WITHOUT_RECENT = """#!/bin/bash
# A kernel without xt_recent, with the error messages of the real programs.
input=$(mktemp) && trap 'rm -f "$input"' EXIT && cat > "$input"
line=$(grep -n -m1 -e '-m recent' "$input" | cut -d: -f1)
if [ -n "$line" ]; then
  echo "Warning: Extension recent revision 0 not supported, missing kernel module?" >&2
  commit=$(tail -n "+$line" "$input" | grep -n -m1 COMMIT | cut -d: -f1)
  commit=$((line + commit - 1))
  if [ {variant} = nft ]; then
    echo "{name} v1.8.9 (nf_tables): " >&2
    echo "line $line: RULE_APPEND failed (No such file or directory): rule in chain KUBE-A" >&2
    exit 4
  fi
  echo "{name}: line $commit failed" >&2
  exit 1
fi
exec {program} "$@" < "$input"
"""


class IptablesProxy(SingleFamilyProxy):
    """A proxy of one family in a namespace with many Services. Each has one endpoint."""

    def __init__(self, namespace: Namespace, family: Family, *, localhost_node_ports: bool = False) -> None:
        self.iptables = IptablesRunner(family)
        context = Context(family, "node-1", localhost_node_ports=localhost_node_ports)
        super().__init__(self.new_backend(), context, namespace=namespace)
        self.apply(*EMPTY_LISTS)

    def new_backend(self) -> IptablesBackend:
        nft = self.iptables.version().nft
        return IptablesBackend(
            self.iptables,
            max_transaction_rules=MAX_TRANSACTION_RULES if nft else UNLIMITED,
            patching=self.iptables.version().supports_patching,
        )

    def put_services(self, numbers: range, *, port: int = 8080) -> None:
        for number in numbers:
            self.put_service(f"good-{number}", number, port=port)

    def put_service(self, name: str, number: int, *, port: int = 8080, affinity: int = 0, node_port: int = 0) -> None:
        prefixes = (
            ("10.96.", "10.244.", ".") if self.context.family is Family.IPV4 else ("fd00:96::", "fd00:244::", ":")
        )
        address = f"{number // 250 + 1}{prefixes[2]}{number % 250 + 1}"
        ports = (ServicePort("http", 80, "TCP", node_port=node_port),)
        self.put(Service("ns", name, (prefixes[0] + address,), ports, affinity_seconds=affinity))
        endpoints = (Endpoint(prefixes[1] + address, "node-2"),)
        served = (EndpointPort("http", port, "TCP"),)
        self.put(EndpointSlice("ns", name, f"ns/{name}", self.context.family, endpoints, served))

    def state(self) -> State:
        def save() -> State:
            with self.iptables.save() as lines:
                return comparable(lines)

        return self.call(save)

    @property
    def rejected(self) -> dict[str, str]:
        return dict(self.result.applied.rejected)


@pytest.fixture
def programs(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the programs of a variant, which is first in PATH."""
    link_programs(programs_of(variant), tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return tmp_path


def without_recent(programs: Path, variant: str) -> None:
    """Make the kernel reject the match `recent`, which rules for session affinity need."""
    for name in ("iptables-restore", "ip6tables-restore"):
        real = (programs / name).readlink()
        (programs / name).unlink()
        (programs / name).write_text(
            WITHOUT_RECENT.replace("{variant}", variant).replace("{name}", name).replace("{program}", str(real))
        )
        (programs / name).chmod(0o755)


@pytest.fixture
def twins(namespaces: Callable[[], Namespace], family: Family, programs: Path) -> tuple[IptablesProxy, IptablesProxy]:
    """Two proxies in namespaces of their own."""
    nodes = namespaces(), namespaces()
    for node in nodes:
        add_counters(node)
    return IptablesProxy(nodes[0], family), IptablesProxy(nodes[1], family)


@pytest.mark.parametrize("family", Family)
def test_at_start_999_of_1000_services_are_programmed(
    twins: tuple[IptablesProxy, IptablesProxy], programs: Path, variant: str
) -> None:
    without_recent(programs, variant)
    proxy, twin = twins
    for each in twins:
        each.put_services(range(999))
    proxy.put_service("bad", 999, affinity=60)
    proxy.sync()
    twin.sync()
    assert proxy.rejected.keys() == {"ns/bad"}
    assert "\n" not in proxy.rejected["ns/bad"]
    assert "Warning" not in proxy.rejected["ns/bad"]
    assert proxy.state() == twin.state()


@pytest.mark.parametrize("family", Family)
def test_changes_of_all_others_are_programmed_while_one_service_keeps_its_rules(
    twins: tuple[IptablesProxy, IptablesProxy], programs: Path, variant: str
) -> None:
    proxy, twin = twins
    for each in twins:
        each.put_services(range(999))
        each.put_service("bad", 999)
        each.sync()
    without_recent(programs, variant)
    for each in twins:
        each.put_services(range(999), port=9090)
    proxy.put_service("bad", 999, affinity=60)
    proxy.sync()
    twin.sync()
    assert proxy.rejected.keys() == {"ns/bad"}
    assert proxy.state() == twin.state()
    proxy.forget()  # a full check changes nothing
    proxy.sync()
    assert proxy.rejected.keys() == {"ns/bad"}
    assert proxy.state() == twin.state()


@pytest.mark.parametrize("family", Family)
def test_rejected_service_keeps_its_rules_over_a_restart_and_after_damage(
    twins: tuple[IptablesProxy, IptablesProxy], programs: Path, variant: str, family: Family
) -> None:
    proxy, twin = twins
    for each in twins:
        each.put_services(range(20))
        each.put_service("bad", 999, node_port=30_999)
        each.sync()
    without_recent(programs, variant)
    proxy.put_service("bad", 999, affinity=60, node_port=30_999)
    proxy.sync()
    assert proxy.rejected.keys() == {"ns/bad"}
    proxy.restart(proxy.new_backend())
    proxy.sync()
    assert proxy.rejected.keys() == {"ns/bad"}
    assert proxy.state() == twin.state()
    chain = f"KUBE-SVC-{port_hash('ns/bad:http', 'TCP')}"
    program = "iptables" if family is Family.IPV4 else "ip6tables"
    assert proxy.namespace is not None
    proxy.namespace.run([program, "-t", "nat", "-F", chain])
    assert proxy.state() != twin.state()
    touched = {"nat": Touched(chains={chain})}
    result = proxy.call(lambda: proxy.families[family].repair(proxy.store, touched))
    assert result.repaired == (Part("nat", "chain", chain),)
    assert proxy.state() == twin.state()


@pytest.mark.parametrize("when", ["start", "running"])
def test_dispatch_rule_that_the_kernel_rejects(namespaces: Callable[[], Namespace], programs: Path, when: str) -> None:
    """The NodePort rules need an nfacct counter that does not exist: the kernel really rejects them."""
    nodes = namespaces(), namespaces()
    for node in nodes:
        node.call(lambda: ensure_counters((INVALID_COUNTER,)))
    proxy, twin = (IptablesProxy(node, Family.IPV4, localhost_node_ports=True) for node in nodes)
    for each in (proxy, twin):
        each.put_services(range(100))
        if when == "running":
            each.sync()
    for each in (proxy, twin):
        each.put_services(range(50), port=9090)
    for number in range(100, 103):
        proxy.put_service(f"bad-{number}", number, node_port=30_000 + number)
    proxy.sync()
    twin.sync()
    assert proxy.rejected.keys() == {f"ns/bad-{number}" for number in range(100, 103)}
    assert proxy.state() == twin.state()


@pytest.mark.parametrize("family", Family)
def test_missing_counter_of_a_base_rule_quarantines_nothing(
    namespace: Namespace, programs: Path, family: Family
) -> None:
    proxy = IptablesProxy(namespace, family)
    proxy.put_services(range(3))
    with pytest.raises(SyncError, match="failed with status"):
        proxy.sync()


@pytest.mark.parametrize("family", Family)
def test_program_that_hangs_is_killed_and_its_limit_grows(
    twins: tuple[IptablesProxy, IptablesProxy], programs: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.iptables.runner.COMMAND_SECONDS", 0.02)
    monkeypatch.setattr("kproxy.iptables.runner.SECONDS_PER_CHARACTER", 0.0)
    proxy, twin = twins
    for name in ("iptables-restore", "ip6tables-restore"):
        real = (programs / name).readlink()
        (programs / name).unlink()
        os.mkfifo(programs / f"{name}.never")
        (programs / name).write_text(f'#!/bin/sh\n[ -e $0.never ] && cat $0.never\nexec {real} "$@"\n')
        (programs / name).chmod(0o755)
    proxy.put_services(range(3))
    twin.put_services(range(3))
    for _ in range(3):
        with pytest.raises(SyncError, match="timed out after"):
            proxy.sync()
    assert proxy.iptables.patience == 8
    for name in ("iptables-restore", "ip6tables-restore"):
        (programs / f"{name}.never").unlink()
    monkeypatch.setattr("kproxy.iptables.runner.COMMAND_SECONDS", 60.0)
    proxy.sync()
    twin.sync()
    assert proxy.iptables.patience == 1
    assert proxy.rejected == {}
    assert proxy.state() == twin.state()


@pytest.mark.parametrize("family", Family)
def test_service_with_thousands_of_endpoints_is_programmed_and_adopted(
    twins: tuple[IptablesProxy, IptablesProxy], family: Family
) -> None:
    proxy, twin = twins
    prefix = "10.245." if family is Family.IPV4 else "fd00:245::"
    separator = "." if family is Family.IPV4 else ":"
    addresses = [f"{prefix}{number // 250 + 1}{separator}{number % 250 + 1}" for number in range(3000)]

    def put(proxy: IptablesProxy, addresses: list[str]) -> None:
        proxy.put_service("big", 1, affinity=60)
        endpoints = tuple(Endpoint(address, "node-2") for address in addresses)
        served = (EndpointPort("http", 8080, "TCP"),)
        proxy.put(EndpointSlice("ns", "big", "ns/big", family, endpoints, served))
        proxy.sync()

    put(proxy, addresses)
    put(proxy, addresses[1:])
    assert sum(proxy.result.applied.written_rules.values()) < 1500
    put(twin, addresses[1:])
    assert proxy.state() == twin.state()
    proxy.forget()
    proxy.sync()
    assert sum(proxy.result.applied.written_rules.values()) == 0
    proxy.context = replace(proxy.context, masquerade_all=True)
    put(proxy, addresses[:1])
    twin.context = proxy.context
    put(twin, addresses[:1])
    assert proxy.state() == twin.state()
