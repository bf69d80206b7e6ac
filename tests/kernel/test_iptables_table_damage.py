"""Damage to a whole table is repaired exactly, without reading more than necessary."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.types import Family
from tests.inprocess import SingleFamilyProxy
from tests.lab.iptables import PREFIXES, current_rules, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.recordings import store
from tests.unit.test_iptables_render import recorded_context

SCENARIO = "dual-stack"
EVERYTHING = {table: Touched(everything=True) for table in ("mangle", "nat", "filter")}

pytestmark = pytest.mark.usefixtures("counters")


class DamagedProxy(SingleFamilyProxy):
    """A proxy that has programmed a recorded cluster and compared its rules. It counts the runs of iptables-save."""

    def __init__(self, namespace: Namespace, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        objects = store(SCENARIO)
        context = recorded_context(SCENARIO, family, objects)
        super().__init__(IptablesBackend(IptablesRunner(family)), context, store=objects, namespace=namespace)
        self.saves: list[str] = []
        save = IptablesRunner.save

        def counted(runner: IptablesRunner, table: str = "") -> AbstractContextManager[Iterator[str]]:
            self.saves.append(table)
            return save(runner, table)

        monkeypatch.setattr(IptablesRunner, "save", counted)
        self.node, self.prefix = namespace, PREFIXES[family]
        self.sync()
        assert self.verify()
        self.intact = current_rules(namespace, family)
        self.saves.clear()

    def is_intact(self) -> bool:
        """Return whether all rules are as after the first sync."""
        return current_rules(self.node, self.context.family) == self.intact

    def check(self, touched: dict[str, Touched]) -> RepairResult:
        """Check what was touched, without the full sync that may be necessary."""
        return self.node.call(lambda: self.families[self.context.family].repair(self.store, touched))


@pytest.fixture
def proxy(
    namespace: Namespace, family: Family, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DamagedProxy:
    """A proxy that uses a variant of iptables."""
    link_programs(programs_of(variant), tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return DamagedProxy(namespace, family, monkeypatch)


@pytest.fixture
def large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all tables as large."""
    monkeypatch.setattr("kproxy.iptables.comparison.MIN_RULES", 0)


@pytest.mark.usefixtures("large_tables")
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("variant", ["nft"])
@pytest.mark.parametrize("listed", [0, 100])
def test_older_rule_set_is_repaired_without_iptables_save(
    proxy: DamagedProxy, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.iptables.table_content.MAX_LISTED_CHAINS", listed)
    saved = proxy.node.run([f"{proxy.prefix}-save", "-t", "nat"]).stdout
    chain = re.findall(r"^-A (KUBE-SEP-\S+) ", saved, re.MULTILINE)[0]
    older = re.sub(rf"(?m)^-A {chain} .*\n", "", saved)
    older = older.replace("COMMIT\n", f"-A {chain} -j ACCEPT\n-A KUBE-MARK-MASQ -j RETURN\nCOMMIT\n")
    older = older.replace("*nat\n", "*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n:FOREIGN - [0:0]\n")
    older = older.replace("COMMIT\n", "-I OUTPUT -j FOREIGN\n-A FOREIGN -j ACCEPT\nCOMMIT\n")
    proxy.node.run([f"{proxy.prefix}-restore"], older)
    result = proxy.check({"nat": Touched(everything=True)})
    assert not result.needs_full_sync
    parts = {part.name for part in result.repaired if part.kind == "chain"}
    damaged = {chain, "KUBE-MARK-MASQ", "KUBE-SVC-AAAAAAAAAAAAAAAA", "OUTPUT"}
    assert parts == damaged if listed else parts > damaged  # all chains of the Service
    proxy.node.run([proxy.prefix, "-t", "nat", "-D", "OUTPUT", "-j", "FOREIGN"])
    proxy.node.run([proxy.prefix, "-t", "nat", "-F", "FOREIGN"])
    proxy.node.run([proxy.prefix, "-t", "nat", "-X", "FOREIGN"])
    assert proxy.is_intact()
    assert not proxy.check(EVERYTHING).repaired
    assert not proxy.saves


@pytest.mark.usefixtures("large_tables")
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("variant", ["nft"])
@pytest.mark.parametrize("command", ["flush ruleset", "delete table FAMILY nat", "delete table FAMILY filter"])
def test_deleted_tables_are_restored_without_iptables_save(proxy: DamagedProxy, command: str) -> None:
    family = "ip" if proxy.context.family is Family.IPV4 else "ip6"
    proxy.node.run(["nft", command.replace("FAMILY", family)])
    if proxy.check(EVERYTHING).needs_full_sync:
        proxy.sync()
    assert proxy.is_intact()
    assert not proxy.saves


@pytest.mark.parametrize("family", [Family.IPV4])
def test_full_sync_does_not_read_again_what_the_check_has_read(
    proxy: DamagedProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.iptables.backend.MAX_REPAIRED_SERVICES", 0)
    proxy.node.run([proxy.prefix, "-t", "nat", "-F"])
    assert proxy.check(EVERYTHING).needs_full_sync
    read = list(proxy.saves)
    proxy.sync()
    assert proxy.saves == read
    assert proxy.is_intact()
    proxy.forget()
    proxy.sync()
    assert len(proxy.saves) > len(read)


@pytest.mark.parametrize("family", [Family.IPV4])
def test_full_sync_reads_again_after_another_change(proxy: DamagedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kproxy.iptables.backend.MAX_REPAIRED_SERVICES", 0)
    proxy.node.run([proxy.prefix, "-t", "nat", "-F"])
    assert proxy.check(EVERYTHING).needs_full_sync
    proxy.node.run([proxy.prefix, "-t", "filter", "-F"])
    proxy.sync()
    assert proxy.is_intact()
