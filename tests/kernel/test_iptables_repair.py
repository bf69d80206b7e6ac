"""Whatever another process does to kproxy's rules in the kernel, the running daemon restores exactly what it changed.

The periodic comparison does not help: its interval is an hour.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kproxy.host import nf_tables
from kproxy.host.netlink import DumpInterruptedError, NetlinkSocket
from kproxy.host.nf_tables import current_generation
from kproxy.iptables.foreign_changes import GenerationCounter
from kproxy.iptables.names import ChainName
from kproxy.iptables.runner import IptablesRunner, RestoreError
from kproxy.model.types import Family
from tests.lab.iptables import PREFIXES, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN

SCENARIO = GOLDEN / "dual-stack"
TABLES = ("mangle", "nat", "filter")
STALE = "KUBE-SVC-AAAAAAAAAAAAAAAA"


class Rules:
    """The rules of one family, and another process that changes them."""

    def __init__(self, namespace: Namespace, family: Family) -> None:
        self._namespace = namespace
        self._prefix = PREFIXES[family]
        self.family = family
        self.before: dict[tuple[str, str], list[str]] = {}

    def run(self, table: str, *arguments: str) -> None:
        """Run iptables."""
        self._namespace.run([self._prefix, "-w", "5", "-t", table, *arguments])

    def restore(self, text: str, *flags: str) -> None:
        """Run iptables-restore."""
        self._namespace.run([f"{self._prefix}-restore", "-w", "5", *flags], text)

    def nft(self, commands: str) -> None:
        """Run nft. FAMILY stands for the family of these rules."""
        self._namespace.run(["nft", commands.replace("FAMILY", "ip" if self.family is Family.IPV4 else "ip6")])

    def dormant_tables(self) -> list[str]:
        """Return the tables that nft lists as dormant."""
        listed = self._namespace.run(["nft", "list", "ruleset"]).stdout
        return re.findall(r"^table (.*) \{\n\tflags dormant", listed, re.MULTILINE)

    def dump(self) -> str:
        """Return the output of iptables-save."""
        return self._namespace.run([f"{self._prefix}-save"]).stdout

    def current(self) -> dict[tuple[str, str], list[str]]:
        """Return the rules of each chain, in order."""
        table, found = "", dict[tuple[str, str], list[str]]()
        for line in self.dump().splitlines():
            if line.startswith("*"):
                table = line
            elif line.startswith((":", "-A ")):
                name = line[1:].split()[0] if line.startswith(":") else line.split()[1]
                rules = found.setdefault((table, name), [])
                rules += [line] if line.startswith("-A ") else []
        return found

    def chain(self, prefix: str) -> str:
        """Return the name of a chain in table nat with at least two rules, or with any rules."""
        names = {name: rules for (table, name), rules in self.before.items() if name.startswith(prefix) and rules}
        return max(names, key=lambda name: (len(names[name]), name))


def flush(table: str, chain: str) -> Callable[[Rules], None]:
    return lambda rules: rules.run(table, "-F", rules.chain(chain) if chain.endswith("-") else chain)


def delete_chain_and_jumps(rules: Rules) -> None:
    chain = rules.chain("KUBE-SEP-")
    jumps = [rule for chain_rules in rules.before.values() for rule in chain_rules if f"-j {chain}" in rule]
    deletions = "".join(f"-D{rule.removeprefix('-A')}\n" for rule in jumps)
    rules.restore(f"*nat\n{deletions}:{chain} - [0:0]\n-X {chain}\nCOMMIT\n", "--noflush")


def delete_everything(rules: Rules) -> None:
    rules.restore("".join(f"*{table}\nCOMMIT\n" for table in TABLES))


def delete_jumps(rules: Rules) -> None:
    for (table, chain), chain_rules in rules.before.items():
        if not chain.startswith("KUBE-"):
            deletions = "".join(f"-D{rule.removeprefix('-A')}\n" for rule in chain_rules)
            rules.restore(f"{table}\n{deletions}COMMIT\n", "--noflush")


def restore_older_rules(rules: Rules) -> None:
    """Restore rules that were saved before: two of their rules are now different, and one chain is stale."""
    older = rules.dump()
    sep = rules.chain("KUBE-SEP-")
    older = re.sub(rf"(-A {sep} .*)-j KUBE-MARK-MASQ\n", "", older)
    older = older.replace("*nat\n", f"*nat\n:{STALE} - [0:0]\n-A {STALE} -j ACCEPT\n")
    rules.restore(older)


def delete_canaries(rules: Rules) -> None:
    for table in TABLES:
        rules.run(table, "-X", "KUBE-PROXY-CANARY")


def replace_with_same_size(rules: Rules) -> None:
    chain = rules.chain("KUBE-SEP-")
    address, _, _ = rules.before["*nat", chain][-1].rpartition(":")
    rules.run("nat", "-R", chain, "2", *_words(f"{address}:9")[2:])


def _words(rule: str) -> list[str]:
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', rule)]


def rename(name: str) -> Callable[[Rules], None]:
    """Rename a chain of a Service. The kernel changes the rules that jump to it."""
    return lambda rules: rules.run("nat", "-E", rules.chain("KUBE-SVC-"), name)


DAMAGES: dict[str, Callable[[Rules], None]] = {
    "flush table nat": lambda rules: rules.run("nat", "-F"),
    "flush table filter": lambda rules: rules.run("filter", "-F"),
    "flush a KUBE-SVC chain": flush("nat", "KUBE-SVC-"),
    "flush a KUBE-SEP chain": flush("nat", "KUBE-SEP-"),
    "flush KUBE-SERVICES": flush("nat", "KUBE-SERVICES"),
    "append a rule in filter": lambda rules: rules.run("filter", "-A", "KUBE-SERVICES", "-j", "RETURN"),
    "flush KUBE-FORWARD": flush("filter", "KUBE-FORWARD"),
    "flush KUBE-MARK-MASQ": flush("nat", "KUBE-MARK-MASQ"),
    "flush KUBE-POSTROUTING": flush("nat", "KUBE-POSTROUTING"),
    "delete a KUBE-SEP chain": delete_chain_and_jumps,
    "delete a rule": lambda rules: rules.run("nat", "-D", rules.chain("KUBE-SVC-"), "1"),
    "insert a rule": lambda rules: rules.run("nat", "-I", rules.chain("KUBE-SVC-"), "-j", "RETURN"),
    "append a rule": lambda rules: rules.run("nat", "-A", "KUBE-SERVICES", "-j", "RETURN"),
    "replace a rule": replace_with_same_size,
    "delete all jumps": delete_jumps,
    "delete everything": delete_everything,
    "delete the canaries": delete_canaries,
    "create a stale chain": lambda rules: rules.restore(
        f"*nat\n:{STALE} - [0:0]\n-A {STALE} -j RETURN\nCOMMIT\n", "--noflush"
    ),
    "restore older rules": restore_older_rules,
    "rename a KUBE-SVC chain": rename(STALE),
}
NFT_DAMAGES: dict[str, Callable[[Rules], None]] = {
    f"make table {table} dormant": lambda rules, table=table: rules.nft(
        f"add table FAMILY {table} {{ flags dormant; }}"
    )
    for table in TABLES
} | {
    "flush a dormant table": lambda rules: rules.nft(
        "add table FAMILY nat { flags dormant; }; flush table FAMILY nat",
    ),
}
"""Damage that only nft can do."""


@pytest.fixture
def variant(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of iptables that works on this machine. It is first in PATH for the test and the daemon."""
    programs = tmp_path / "programs"
    programs.mkdir()
    link_programs(programs_of(variant), programs)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return variant


@pytest.fixture
def daemon(node: Namespace, tmp_path: Path) -> Iterator[Callable[..., tuple[Path, list[Rules]]]]:
    """Start the daemon, and wait until it has synced both families."""
    running: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> tuple[Path, list[Rules]]:
        log = tmp_path / "log"
        command = [KPROXY, "run", f"--config={SCENARIO}/config.json", f"--objects={SCENARIO}", *flags]
        with log.open("w") as output:
            running.append(node.popen(command, output))
        families = [Rules(node, family) for family in Family]
        for rules in families:
            wait_until(lambda rules=rules: f"{rules.family.value}: synced" in log.read_text(), "the first sync")  # type: ignore[misc]
            rules.before = rules.current()
        return log, families

    yield start
    for process in running:
        process.terminate()
        assert process.wait(HANG_GUARD) == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_repaired_exactly(variant: str, damage: str, daemon: Callable[..., tuple[Path, list[Rules]]]) -> None:
    assert variant
    check_repair(DAMAGES[damage], daemon)


@pytest.mark.usefixtures("programs_of_nft")
@pytest.mark.parametrize("damage", NFT_DAMAGES)
def test_damage_by_nft_is_repaired_exactly(damage: str, daemon: Callable[..., tuple[Path, list[Rules]]]) -> None:
    check_repair(NFT_DAMAGES[damage], daemon)


@pytest.mark.usefixtures("programs_of_nft")
def test_table_that_was_made_dormant_before_the_start_is_awakened(
    node: Namespace, daemon: Callable[..., tuple[Path, list[Rules]]]
) -> None:
    node.run(["nft", "add table ip nat { flags dormant; }; add table ip6 filter { flags dormant; }"])
    _, families = daemon("--iptables-sync-period=1h")
    assert not families[0].dormant_tables()


def check_repair(inflict: Callable[[Rules], None], daemon: Callable[..., tuple[Path, list[Rules]]]) -> None:
    """Inflict damage on both families, and wait until the daemon has repaired it."""
    log, families = daemon("--iptables-sync-period=1h", "--iptables-min-sync-period=0s")
    for rules in families:
        since = log.read_text().count(f"{rules.family.value}: ")
        inflict(rules)
        wait_until(
            lambda rules=rules: not rules.dormant_tables() and rules.current() == rules.before,  # type: ignore[misc]
            "the damage is repaired",
        )
        wait_until(
            lambda rules=rules, since=since: log.read_text().count(f"{rules.family.value}: ") > since,  # type: ignore[misc]
            "the repair is logged",
        )
    assert "cannot check" not in log.read_text()


def test_jumps_are_moved_before_a_rule_that_ends_the_evaluation(
    variant: str, daemon: Callable[..., tuple[Path, list[Rules]]]
) -> None:
    _, families = daemon("--iptables-sync-period=1h")
    assert variant
    for rules in families:
        for table, chain in (("nat", "OUTPUT"), ("nat", "PREROUTING"), ("filter", "FORWARD")):
            rules.run(table, "-I", chain, "-j", "RETURN")
            own = rules.before[f"*{table}", chain]
            wait_until(
                lambda table=table, chain=chain, own=own, rules=rules: (  # type: ignore[misc]
                    rules.current()[f"*{table}", chain] == [*own, f"-A {chain} -j RETURN"]
                ),
                "the jumps come first",
            )


def test_rule_that_drops_service_traffic_first_is_reported_and_kept(
    variant: str, daemon: Callable[..., tuple[Path, list[Rules]]]
) -> None:
    log, families = daemon("--iptables-sync-period=1h")
    assert variant
    rules = families[0]
    address = next(
        match[1]
        for rule in rules.before["*nat", "KUBE-SERVICES"]
        if (match := re.search(r"-d (\S+) .* -j KUBE-SVC-", rule))
    )
    rules.run("nat", "-I", "OUTPUT", "-d", address, "-j", "ACCEPT")
    rule = f"-A OUTPUT -d {address} -j ACCEPT"
    finding = f"in chain OUTPUT of table nat decides about traffic to Services before kproxy's rules: {rule}"
    wait_until(lambda: finding in log.read_text(), "the finding is logged")
    assert rules.current()["*nat", "OUTPUT"][0] == rule


@pytest.mark.usefixtures("programs_of_nft")
def test_own_transactions_are_not_foreign(node: Namespace) -> None:
    generations = GenerationCounter(current_generation)
    runners = [IptablesRunner(family, generations=generations) for family in Family]
    text = "*mangle\n:KUBE-A - [0:0]\nCOMMIT\n*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\nCOMMIT\n"
    before = node.call(runners[0].foreign_changes)
    for runner in runners:
        node.call(lambda runner=runner: runner.restore_each([text, text.replace("KUBE-A", "KUBE-B")]))  # type: ignore[misc]
    assert node.call(runners[0].foreign_changes) == before
    node.run(["iptables", "-t", "nat", "-F", "KUBE-A"])
    assert node.call(runners[1].foreign_changes) != before


@pytest.mark.usefixtures("programs_of_nft")
def test_foreign_transaction_during_a_rejected_own_one_is_noticed(node: Namespace) -> None:
    runner = IptablesRunner(Family.IPV4, generations=GenerationCounter(current_generation))
    node.call(lambda: runner.restore("*nat\n:KUBE-A - [0:0]\nCOMMIT\n"))
    before = node.call(runner.foreign_changes)

    def texts() -> Iterator[str]:
        yield "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j MISSING\nCOMMIT\n"
        node.run(["nft", "add table ip other"])

    with pytest.raises(RestoreError):
        node.call(lambda: runner.restore_each(texts()))
    assert node.call(runner.foreign_changes) != before


@pytest.mark.usefixtures("programs_of_nft")
def test_fingerprint_identifies_the_rules_of_a_chain(node: Namespace) -> None:
    runner = IptablesRunner(Family.IPV4)
    chain = ChainName("nat", "KUBE-A")
    text = "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\nCOMMIT\n"
    commands = (
        (["iptables-restore", "--noflush"], text),
        (["iptables-restore", "--noflush"], text),
        (["iptables", "-t", "nat", "-R", "KUBE-A", "1", "-j", "ACCEPT"], ""),
        (["iptables", "-t", "nat", "-I", "KUBE-A", "-j", "RETURN"], ""),
        (["iptables-restore"], text),
        (["iptables", "-t", "nat", "-F", "KUBE-A"], ""),
    )
    seen: dict[str, int] = {}
    for command, stdin in commands:
        node.run(command, stdin)
        found, empty = node.call(lambda: runner.fingerprints([[chain], [ChainName("nat", "ABSENT")]])) or (0, 0)
        rules = node.run(["iptables", "-t", "nat", "-S", "KUBE-A"]).stdout
        assert seen.setdefault(rules, found) == found  # also if the same rules were written again
        assert (found == empty) is ("-A " not in rules)
    assert len(set(seen.values())) == len(seen) == 4


@pytest.mark.usefixtures("programs_of_nft")
def test_interrupted_dump_of_a_chain_is_the_only_one_to_be_repeated(
    node: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f":KUBE-{name} - [0:0]\n-A KUBE-{name} -j RETURN\n" for name in "ABC")
    node.run(["iptables-restore", "--noflush"], f"*nat\n{text}COMMIT\n")
    groups = [[ChainName("nat", f"KUBE-{name}")] for name in "ABC"]
    runner = IptablesRunner(Family.IPV4)
    expected = node.call(lambda: runner.fingerprints(groups))
    dumped: list[str] = []
    rule_digests = nf_tables._rule_digests

    def interrupted(netlink: NetlinkSocket, family: Family, table: str, chain: str) -> Iterator[int]:
        dumped.append(chain)
        yield from rule_digests(netlink, family, table, chain)
        if dumped.count(chain) == 1 and chain == "KUBE-B":
            raise DumpInterruptedError(0, "interrupted")

    monkeypatch.setattr(nf_tables, "_rule_digests", interrupted)
    assert node.call(lambda: runner.fingerprints(groups)) == expected
    assert dumped == ["KUBE-A", "KUBE-B", "KUBE-B", "KUBE-C"]


@pytest.mark.usefixtures("programs_of_nft")
def test_fingerprint_does_not_depend_on_packets_and_other_chains(node: Namespace) -> None:
    runner = IptablesRunner(Family.IPV4)
    node.run(["iptables", "-A", "OUTPUT", "-j", "RETURN"])
    before = node.call(lambda: runner.fingerprints([[ChainName("filter", "OUTPUT")]]))
    node.run(["iptables", "-t", "nat", "-N", "OTHER"])
    node.run(["iptables", "-N", "OTHER"])
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"packet", ("127.0.0.1", 9))
    assert "-A OUTPUT -c 0 0 " not in node.run(["iptables", "-v", "-S", "OUTPUT"]).stdout
    assert node.call(lambda: runner.fingerprints([[ChainName("filter", "OUTPUT")]])) == before


@pytest.fixture
def programs_of_nft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the programs of iptables-nft first in PATH."""
    link_programs(programs_of("nft"), tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
