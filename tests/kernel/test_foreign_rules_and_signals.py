"""Foreign rules in the tables that kproxy uses, signals, and the ways in which the daemon ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from kproxy.model.types import Family
from tests.lab.iptables import current_rules, restore_recording
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN, recorded

CLUSTER = [f"--config={GOLDEN}/clusterip/config.json", f"--objects={GOLDEN}/clusterip"]


def apply(node: Namespace) -> str:
    return node.run([KPROXY, "apply", *CLUSTER]).stderr


def jumps(node: Namespace, chain: str, target: str) -> int:
    """Count the jumps with nft, which lists rules that iptables-save cannot print."""
    rules = node.run(["nft", "list", "chain", "ip", "filter", chain]).stdout
    return rules.count(f"jump {target}")


def test_jumps_are_not_duplicated_in_a_table_that_iptables_cannot_print(node: Namespace) -> None:
    apply(node)
    node.run(["nft", "add", "rule", "ip", "filter", "FORWARD", "ct", "state", "new", "meta", "nftrace", "set", "1"])
    node.run(["iptables", "-I", "KUBE-FIREWALL", "-s", "192.0.2.1", "-j", "DROP"])
    for _ in range(2):
        assert "rules that only nft can print" in apply(node)
    assert {chain: jumps(node, chain, "KUBE-PROXY-FIREWALL") for chain in ("INPUT", "FORWARD", "OUTPUT")} == {
        "INPUT": 1,
        "FORWARD": 1,
        "OUTPUT": 1,
    }
    assert "192.0.2.1" in node.run(["nft", "list", "chain", "ip", "filter", "KUBE-FIREWALL"]).stdout


def test_missing_jumps_are_added_beside_unprintable_rules(node: Namespace) -> None:
    node.run(["iptables", "-N", "OTHER"])
    node.run(["nft", "add", "rule", "ip", "filter", "OTHER", "ct", "state", "new", "meta", "nftrace", "set", "1"])
    apply(node)
    assert jumps(node, "FORWARD", "KUBE-SERVICES") == 1
    assert jumps(node, "INPUT", "KUBE-FIREWALL") == 1


UNPRINTABLE_RULES = (
    ("filter", "add rule ip filter OUTPUT meta skuid 12345 counter drop"),
    ("filter", "insert rule ip filter FORWARD meta cpu 99 accept"),
    ("filter", "add rule ip filter foreign meta length 5 accept"),
    ("nat", "insert rule ip nat PREROUTING meta cpu 99 accept"),
    ("mangle", "add rule ip mangle FORWARD meta cpu 99 accept"),
)
"""Tables and rules with which iptables-save 1.8.9 fails."""


@pytest.mark.parametrize(("table", "rule"), UNPRINTABLE_RULES)
@pytest.mark.parametrize("previous", ["nothing", "kube-proxy"])
def test_unprintable_rule_does_not_prevent_syncs(node: Namespace, table: str, rule: str, previous: str) -> None:
    if previous == "kube-proxy":
        restore_recording(node, "nodeport")
    add_foreign_rule(node, rule)
    for _ in range(2):
        messages = [line for line in apply(node).splitlines() if "only nft can print" in line]
        assert len(messages) == 1
        assert f"table {table} has rules that only nft can print (iptables-save failed with status 3: " in messages[0]
    apply_other = [f"--config={GOLDEN}/clusterip/config.json", f"--objects={GOLDEN}/nodeport"]
    node.run([KPROXY, "apply", *apply_other])
    apply(node)
    delete_foreign_rule(node, rule)
    apply(node)
    assert current_rules(node, Family.IPV4) == recorded("clusterip", Family.IPV4)


@pytest.mark.parametrize(("table", "rule"), UNPRINTABLE_RULES)
def test_unprintable_rule_does_not_prevent_cleanup_of_other_tables(node: Namespace, table: str, rule: str) -> None:
    apply(node)
    add_foreign_rule(node, rule)
    log = node.run([KPROXY, "run", "--cleanup"]).stderr
    assert f"table {table} has rules that only nft can print" in log
    for other in {"filter", "nat", "mangle"} - {table}:
        remaining = node.run(["iptables-save", "-t", other]).stdout
        assert "KUBE-" not in remaining.replace("KUBE-FIREWALL", "")


def add_foreign_rule(node: Namespace, rule: str) -> None:
    """Add a foreign rule, after iptables has created its chain."""
    table, chain = rule.split()[3:5]
    new = "" if chain.isupper() else f":{chain} - [0:0]\n"
    edits = f"-A {chain} -j ACCEPT\n-D {chain} -j ACCEPT\n"
    node.run(["iptables-restore", "--noflush"], f"*{table}\n{new}{edits}COMMIT\n")
    node.run(["nft", *rule.split()])


def delete_foreign_rule(node: Namespace, rule: str) -> None:
    table, chain = rule.split()[3:5]
    shown = node.run(["nft", "-a", "list", "chain", "ip", table, chain]).stdout.splitlines()
    handle = next(line.split()[-1] for line in shown if "meta " in line)
    node.run(["nft", "delete", "rule", "ip", table, chain, "handle", handle])
    if chain == "foreign":
        node.run(["nft", "delete", "chain", "ip", table, chain])


def test_duplicate_jumps_are_removed(node: Namespace) -> None:
    apply(node)
    before = node.run(["iptables-save"]).stdout.splitlines()
    jump = next(line for line in before if line.startswith("-A OUTPUT") and "KUBE-PROXY-FIREWALL" in line)
    for _ in range(2):
        node.run(["iptables-restore", "--noflush"], f"*filter\n{jump}\nCOMMIT\n")
    apply(node)
    after = node.run(["iptables-save"]).stdout.splitlines()
    assert sorted(line for line in after if not line.startswith(("#", ":"))) == sorted(
        line for line in before if not line.startswith(("#", ":"))
    )


def test_foreign_jump_with_a_match_is_kept(node: Namespace) -> None:
    node.run(["iptables", "-t", "nat", "-N", "KUBE-SERVICES"])
    node.run(["iptables", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "KUBE-SERVICES"])
    apply(node)
    rules = node.run(["iptables", "-t", "nat", "-S", "OUTPUT"]).stdout.splitlines()
    assert [rule for rule in rules if rule.endswith("-j KUBE-SERVICES")] == [
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        "-A OUTPUT -d 192.0.2.9/32 -j KUBE-SERVICES",
    ]


def test_cluster_cidr_of_all_addresses_masquerades_nothing(node: Namespace) -> None:
    node.run([KPROXY, "apply", *CLUSTER, "--cluster-cidr=0.0.0.0/0"])
    rules = node.run(["iptables-save", "-t", "nat"]).stdout
    assert "-A KUBE-SVC-XRY76EGRC3BSCIIJ" in rules
    assert not [line for line in rules.splitlines() if "cluster IP" in line and "KUBE-MARK-MASQ" in line]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)])
def test_simultaneous_signals_stop_the_daemon(
    node: Namespace, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    for attempt in range(5):
        log = tmp_path / f"log-{attempt}"
        with log.open("w") as output:
            process = node.popen([KPROXY, "run", *CLUSTER], output)
        while ": synced " not in log.read_text():
            assert process.poll() is None, log.read_text()
        for number in numbers:
            process.send_signal(number)
        assert process.wait(HANG_GUARD) == 0


@pytest.mark.parametrize("prefix", [[], ["unshare", "--pid", "--fork", "--kill-child"]], ids=["", "pid-1"])
def test_other_signals_do_not_stop_the_daemon(node: Namespace, tmp_path: Path, prefix: list[str]) -> None:
    """Also for PID 1 of a container."""
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([*prefix, KPROXY, "run", *CLUSTER], output)
    wait_until(lambda: "IPv6: synced" in log.read_text(), "the first sync")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    daemon = int(children[0]) if prefix else process.pid
    ignored = "ignored; kproxy watches its configuration file and needs no signal"
    for number, message in (
        (signal.SIGHUP, f"] SIGHUP: {ignored}"),
        (signal.SIGUSR2, f"] SIGUSR2: {ignored}"),
        (signal.SIGUSR1, "] SIGUSR1: writing the stacks of all threads to stderr"),
        (signal.SIGQUIT, "] SIGQUIT: writing the stacks of all threads to stderr"),
    ):
        for silent in (signal.SIGPIPE, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR):
            os.kill(daemon, silent)
        os.kill(daemon, number)
        wait_until(partial(_contains, log, message), message)
    wait_until(lambda: log.read_text().count("in _wait_for_stop") == 2, "two stacks of the main thread")
    stacks = log.read_text()
    assert "Current thread 0x" in stacks
    assert 'sync/reconciler.py", line' in stacks
    assert process.poll() is None
    os.kill(daemon, signal.SIGTERM)
    assert process.wait(HANG_GUARD) == 0


def _contains(log: Path, text: str) -> bool:
    return text in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT])
def test_early_signals_do_not_stop_the_daemon(node: Namespace, tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    script = textwrap.dedent(f"""\
        import os, sys
        sys.argv[1:] = ["run", *{CLUSTER!r}]
        import kproxy.cli.main as command
        run = command.main
        def send_signal_first(arguments):
            os.kill(os.getpid(), {int(number)})
            return run(arguments)
        command.main = send_signal_first
        from kproxy.__main__ import main
        sys.exit(main())
    """)
    with log.open("w") as output:
        process = node.popen([sys.executable, "-c", script], output)
    wait_until(
        lambda: f"] {number.name}: " in log.read_text() or process.poll() is not None, "a log line about the signal"
    )
    wait_until(lambda: "IPv6: synced" in log.read_text() or process.poll() is not None, "the first sync")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


def test_daemon_stops_while_iptables_hangs(node: Namespace, tmp_path: Path) -> None:
    """As PID 1 of a container, for which the kernel ignores signals without a handler."""
    programs = tmp_path / "bin"
    programs.mkdir()
    hanging = programs / "iptables"
    hanging.write_text(f"#!/bin/sh\ntouch {tmp_path}/hanging\nexec sleep 1000\n")
    hanging.chmod(0o755)
    script = textwrap.dedent(f"""\
        export PATH={programs}:$PATH
        {KPROXY} run {" ".join(CLUSTER)} & pid=$!
        until [ -e {tmp_path}/hanging ]; do sleep 0.01; done
        kill -TERM $pid; wait $pid
    """)
    done = node.run(["sh", "-c", script], check=False)
    assert done.returncode == 0, done.stderr


def test_daemon_exits_when_a_thread_fails(node: Namespace) -> None:
    script = textwrap.dedent(f"""\
        import sys
        from kproxy.documents.watch import PathWatcher
        from kproxy.cli.main import main
        def broken(self):
            raise MemoryError("no more")
        PathWatcher._run = broken
        sys.exit(main(["run", "--objects={GOLDEN}/clusterip"]))
    """)
    done = node.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 1
    assert "thread file-source failed: MemoryError('no more')" in done.stderr
    assert "Traceback" not in done.stderr


def test_number_out_of_range_in_a_file_does_not_prevent_later_changes(node: Namespace, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    for name in ("services", "endpointslices", "nodes"):
        (objects / f"{name}.json").write_bytes((GOLDEN / "clusterip" / f"{name}.json").read_bytes())
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([KPROXY, "run", f"--objects={objects}", "--hostname-override=node-1", "--v=2"], output)
    wait_for(log, process, ": synced ")
    (objects / "bad.json").write_text(
        '{"kind":"Service","apiVersion":"v1","metadata":{"name":"x"},"spec":{"clusterIP":"10.96.0.9","ports":[{"port":'
        + "9" * 5000
        + "}]}}"
    )
    wait_for(log, process, "bad.json")
    (objects / "bad.json").unlink()
    (objects / "services.json").write_bytes((GOLDEN / "no-endpoints" / "services.json").read_bytes())
    wait_for(log, process, "changed service")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "removal",
    [
        ("-t nat -F",),
        ("-t filter -F",),
        ("-t nat -F KUBE-SERVICES",),
        ("-t nat -D KUBE-SERVICES 1",),
        ("-t nat -I KUBE-NODEPORTS -j RETURN",),
        ("-t nat -D PREROUTING 1",),
        ("-t filter -F INPUT",),
        ("-t filter -F KUBE-FIREWALL",),
        ("-t nat -F KUBE-POSTROUTING",),
        ("-t filter -F KUBE-FORWARD",),
        ("-t nat -F", "-t nat -X", "-t filter -F", "-t filter -X", "-t mangle -F", "-t mangle -X"),
    ],
)
def test_rules_flushed_by_another_process_are_restored(
    node: Namespace, tmp_path: Path, removal: tuple[str, ...]
) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([KPROXY, "run", *CLUSTER, "--iptables-sync-period=1s"], output)
    for family in Family:
        wait_for(log, process, f"{family.value}: synced")
    expected = current_rules(node, Family.IPV4)
    for command in removal:
        node.run(["iptables", *command.split()], check=False)  # kproxy may already have restored what is to be deleted
    wait_until(lambda: current_rules(node, Family.IPV4) == expected, "the rules to be restored")
    wait_for(log, process, "which iptables had changed")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


def wait_for(log: Path, process: subprocess.Popen[str], text: str) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
