"""What kproxy uses on the host: commands, netlink, nfacct counters and the installed iptables."""

from __future__ import annotations

import _thread
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import pytest

from kproxy.host.commands import CommandError, CommandRunner, first_line, run
from kproxy.host.netlink import NETLINK_NETFILTER, DumpInterruptedError, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import NLM_F_CREATE, attribute, nfgenmsg, nfnl_type
from kproxy.host.nf_tables import count_rules
from kproxy.host.nfacct import NFNL_MSG_ACCT_NEW, NFNL_SUBSYS_ACCT, ensure_counters
from kproxy.iptables.names import ChainName
from kproxy.iptables.runner import IptablesRunner, RestoreError, make_restore_error, parse_version
from kproxy.model.types import Family
from kproxy.nftables.kernel import NftCommit
from kproxy.nftables.transaction import Transaction
from tests.clock import Clock
from tests.lab.iptables import link_programs, missing_variant, programs_of
from tests.lab.namespace import Namespace
from tests.lab.waiting import wait_until
from tests.unit.test_iptables_restore_errors import VARIANTS, Case, lines_of

GUARD = 30.0
PYTHON = sys.executable


# Commands.


def test_command_reads_input_and_returns_status_and_output() -> None:
    done = run(["sh", "-c", "cat; echo oops >&2; exit 3"], "hello\n", timeout=GUARD)
    assert (done.code, done.stdout, done.stderr) == (3, "hello\n", "oops\n")


def test_error_names_a_missing_command() -> None:
    with pytest.raises(CommandError, match=r"^cannot run no-such-program: No such file or directory$"):
        run(["no-such-program"], timeout=GUARD)
    with (
        pytest.raises(CommandError, match="cannot run no-such-program"),
        CommandRunner().stream_output(["no-such-program"], timeout=GUARD),
    ):
        pass


def test_error_names_a_file_that_is_not_executable(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("text")
    with pytest.raises(CommandError, match=f"^cannot run {path}: Permission denied$"):
        run([str(path)], timeout=GUARD)


def test_hanging_command_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "never"
    os.mkfifo(fifo)
    done = run(["cat", str(fifo)], timeout=0.01)
    assert done.code == -SIGKILL
    assert "cat timed out after" in done.stderr


@pytest.mark.parametrize("size", [1 << 21])
def test_large_input_and_output_do_not_block(size: int) -> None:
    done = run(["sh", "-c", "tee /dev/stderr"], "x" * size, timeout=GUARD)
    assert (done.code, len(done.stdout), len(done.stderr)) == (0, size, size)


def test_command_need_not_read_its_input() -> None:
    assert run(["true"], "x" * (1 << 21), timeout=GUARD).code == 0


def test_output_need_not_be_utf8() -> None:
    done = run(["sh", "-c", r"printf '\377'; printf '\376' >&2; exit 1"], timeout=GUARD)
    assert done.code == 1


def test_output_is_read_line_by_line() -> None:
    with CommandRunner().stream_output(["sh", "-c", "echo one; echo two"], timeout=GUARD) as lines:
        assert next(lines) == "one\n"
        assert list(lines) == ["two\n"]


def test_large_output_is_read_completely() -> None:
    with CommandRunner().stream_output(["seq", "300000"], timeout=GUARD) as lines:
        assert sum(1 for _ in lines) == 300_000


def test_failure_after_the_output_raises() -> None:
    with (
        pytest.raises(CommandError, match=r"^sh failed with status 3: oops$"),
        CommandRunner().stream_output(
            ["sh", "-c", "echo one; echo >&2; echo oops >&2; echo more >&2; exit 3"], timeout=GUARD
        ) as lines,
    ):
        assert list(lines) == ["one\n"]


def test_large_stderr_does_not_block() -> None:
    chatty = "head -c 1000000 /dev/zero >&2; echo done"
    with CommandRunner().stream_output(["timeout", "5", "sh", "-c", chatty], timeout=GUARD) as lines:
        assert list(lines) == ["done\n"]


def test_output_lines_need_not_be_utf8() -> None:
    with CommandRunner().stream_output(
        ["printf", r"-A KUBE -m comment --comment \377 -j X\n-A B\n"], timeout=GUARD
    ) as lines:
        assert [line.split()[1] for line in lines] == ["KUBE", "B"]


def test_exception_while_reading_ends_the_command() -> None:
    def fail() -> None:
        with CommandRunner().stream_output(["timeout", "30", "yes"], timeout=GUARD) as lines:
            raise ZeroDivisionError(next(lines))

    with pytest.raises(ZeroDivisionError, match="y"):
        fail()


def test_command_that_hangs_while_read_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "never"
    os.mkfifo(fifo)
    with (
        pytest.raises(CommandError, match=r"^cat timed out after 0 s$"),
        CommandRunner().stream_output(["cat", str(fifo)], timeout=0.01) as lines,
    ):
        assert list(lines) == []


def test_reading_output_needs_no_temporary_files(namespace: Namespace) -> None:
    """A container may have a read-only root file system."""
    script = (
        "from kproxy.host.commands import CommandRunner\n"
        "with CommandRunner().stream_output(['echo', 'here'], timeout=30) as lines: print(*lines)"
    )
    read_only = "".join(
        f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && " for folder in ("/tmp", "/var/tmp")
    )
    command = (
        f'export TMPDIR=/nonexistent; {read_only} ! touch /tmp/x 2>/dev/null && cd /proc && exec {PYTHON} -B -c "$1"'
    )
    done = namespace.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", command, "sh", script])
    assert done.stdout.split() == ["here"]


def open_when_reader_exists(fifo: Path) -> int:
    """Wait until a process opens a FIFO for reading; return the descriptor of its write end (fifo(7))."""
    found: list[int] = []

    def try_to_open() -> bool:
        with suppress(OSError):
            found.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    wait_until(try_to_open, "a reader of the FIFO")
    return found[0]


def test_chunks_are_generated_while_the_command_reads(tmp_path: Path) -> None:
    """The iterator yields the second chunk only after the program has handled the first one."""
    seen = tmp_path / "seen"
    os.mkfifo(seen)

    def chunks() -> Iterator[str]:
        yield "one\n"
        assert seen.read_text() == "one\n"
        yield "two\n"

    done = CommandRunner().stream_input(
        ["sh", "-c", f"read a; echo $a > {seen}; read b; echo $b >&2"], chunks(), timeout=GUARD
    )
    assert (done.code, done.stderr) == (0, "two\n")


def test_no_chunks_are_generated_after_the_command_exits() -> None:
    generated: list[int] = []

    def chunks() -> Iterator[str]:
        for number in range(10_000):
            generated.append(number)
            yield "x" * 100_000

    done = CommandRunner().stream_input(
        ["sh", "-c", "head -c 1 >/dev/null; echo enough >&2; exit 3"], chunks(), timeout=GUARD
    )
    assert (done.code, done.stderr) == (3, "enough\n")
    assert len(generated) < 10_000


def test_command_that_ignores_part_of_its_input_has_failed() -> None:
    chunks = ("x" * 100_000 for _ in range(100))
    done = CommandRunner().stream_input(["sh", "-c", "head -c 1 >/dev/null"], chunks, timeout=GUARD)
    assert (done.code, done.stderr) == (-1, "sh exited before reading all of its input")


def test_no_chunks_are_generated_after_stop() -> None:
    runner, generated = CommandRunner(), []

    def chunks() -> Iterator[str]:
        for number in range(10):
            generated.append(number)
            if number == 3:
                runner.stop()
            yield "one\n"

    assert runner.stream_input(["cat"], chunks(), timeout=GUARD).code != 0
    assert generated == [0, 1, 2, 3]


def test_timeout_applies_to_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("kproxy.host.commands.monotonic", clock)

    def chunks() -> Iterator[str]:
        for _ in range(4):
            yield "one\n"
            clock.advance_and_wait(0.0006)

    assert CommandRunner().stream_input(["cat"], chunks(), timeout=0.001).code == 0


def test_each_chunk_may_change_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = Clock(), iter([0.001, 0.001, 10.0])
    monkeypatch.setattr("kproxy.host.commands.monotonic", clock)

    def chunks() -> Iterator[str]:
        yield "one\n"
        yield "two\n"
        clock.advance_and_wait(0.0006)

    assert CommandRunner().stream_input(["cat"], chunks(), timeout=lambda: next(limits)).code == 0
    assert next(limits, None) is None


def test_progress_is_reported_while_a_program_reads_its_input() -> None:
    progress: list[int] = []
    generated: list[int] = []

    def chunks() -> Iterator[str]:
        for number in range(5):
            generated.append(number)
            yield "x" * (1 << 21)

    CommandRunner(lambda: progress.append(len(generated))).stream_input(["cat"], chunks(), timeout=GUARD)
    assert {1, 2, 3, 4, 5} <= set(progress)


def test_no_progress_is_reported_for_a_program_that_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    progress: list[None] = []
    done = CommandRunner(lambda: progress.append(None)).stream_input(
        ["cat", str(tmp_path / "never")], ["one\n", "two\n"], timeout=0.01
    )
    assert done.timed_out
    assert progress == []


def test_watchdog_thread_ends_with_the_command() -> None:
    before = len(os.listdir("/proc/self/task"))
    CommandRunner().stream_input(["cat"], ["one\n"] * 3, timeout=GUARD)
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before, "the watchdog's thread has ended")


def test_command_without_a_watchdog_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    with pytest.raises(CommandError, match=r"^cannot start a watchdog for sh: can't start new thread$"):
        CommandRunner().stream_input(["sh", "-c", f"cat; touch {tmp_path}/ended"], ["one\n"], timeout=GUARD)
    assert list(tmp_path.iterdir()) == []


def test_unread_output_does_not_block_stream_input() -> None:
    assert CommandRunner().stream_input(["cat"], ["x" * 100_000] * 20, timeout=GUARD).code == 0


def test_command_may_exit_before_the_first_chunk(tmp_path: Path) -> None:
    fifo = tmp_path / "stdin-closed"
    os.mkfifo(fifo)

    def chunks() -> Iterator[str]:
        assert fifo.read_text() == ""
        yield "one\n"

    assert CommandRunner().stream_input(["sh", "-c", f"exec 0<&- 3>{fifo}; exit 3"], chunks(), timeout=GUARD).code == 3


@pytest.mark.parametrize("how", ["stop", "timeout"])
def test_child_processes_are_killed_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """Otherwise the writer would block forever on the pipe, which the child keeps open."""
    clock, runner, codes = Clock(), CommandRunner(), list[int]()
    monkeypatch.setattr("kproxy.host.commands.monotonic", clock)
    fifo = tmp_path / "never"
    os.mkfifo(fifo)

    def feed() -> None:
        argv = ["sh", "-c", f"cat {fifo}; :"]
        codes.append(runner.stream_input(argv, ["x" * 1_000_000] * 3, timeout=0.001).code)

    thread = threading.Thread(target=feed)
    thread.start()
    write_end = open_when_reader_exists(fifo)
    if how == "stop":
        runner.stop()
    else:
        give_up = time.monotonic() + GUARD
        while thread.is_alive() and time.monotonic() < give_up:
            clock.advance(1.0)  # repeatedly: a slow writer may restart its timeout in between
            thread.join(0.01)
    thread.join(GUARD)
    ended = list(codes)
    os.close(write_end)
    thread.join()
    assert ended == [-SIGKILL]


def test_command_is_killed_when_generating_a_chunk_fails(tmp_path: Path) -> None:
    def chunks() -> Iterator[str]:
        yield "one\n"
        raise ValueError("no second chunk")

    with pytest.raises(ValueError, match="no second chunk"):
        CommandRunner().stream_input(["sh", "-c", f"cat; touch {tmp_path}/ended"], chunks(), timeout=GUARD)
    assert list(tmp_path.iterdir()) == []


def test_hanging_command_is_killed_while_streaming_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    done = CommandRunner().stream_input(["cat", str(tmp_path / "never")], ["one\n"], timeout=0.01)
    assert (done.code, done.stderr) == (-SIGKILL, "cat timed out after 0 s")


def test_error_names_a_missing_command_while_streaming_input() -> None:
    with pytest.raises(CommandError, match="cannot run no-such-program: No such file"):
        CommandRunner().stream_input(["no-such-program"], ["one"], timeout=GUARD)


def run_methods(argv: list[str]) -> dict[str, Callable[[], object]]:
    """Return one function per method of `CommandRunner` that runs a program to its end."""

    def read() -> list[str]:
        with CommandRunner().stream_output(argv, timeout=GUARD) as lines:
            return list(lines)

    return {
        "run": lambda: run(argv, "x" * (1 << 21), timeout=GUARD).code,
        "stream_input": lambda: CommandRunner().stream_input(argv, ["x" * (1 << 21)], timeout=GUARD).code,
        "stream_output": read,
    }


@pytest.mark.parametrize(("method", "result"), [("run", 0), ("stream_input", 0), ("stream_output", ["done\n"])])
def test_slow_command_is_logged_while_it_runs_and_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, method: str, result: object
) -> None:
    monkeypatch.setattr("kproxy.host.commands.SLOW_SECONDS", 0.001)
    caplog.set_level(logging.INFO)
    fifo = tmp_path / "never"
    os.mkfifo(fifo)
    results: list[object] = []
    work = run_methods(["sh", "-c", f"cat {fifo}; cat >/dev/null; echo done"])[method]
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    write_end = open_when_reader_exists(fifo)
    wait_until(lambda: len(caplog.messages) >= 2, "two log lines about the running program")
    os.close(write_end)
    thread.join(GUARD)
    assert results == [result]
    *running, ended = caplog.messages
    assert all(re.fullmatch(r"sh is still running after \d s \(pid \d+\)", each) for each in running)
    assert re.fullmatch(r"sh exited with status 0 after \d s \(pid \d+\)", ended)


def test_slow_nft_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr("kproxy.host.commands.SLOW_SECONDS", 0.001)
    fifo = tmp_path / "never"
    os.mkfifo(fifo)
    program = tmp_path / "nft"
    program.write_text(f"#!/bin/sh\ncat {fifo}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    thread = threading.Thread(target=lambda: NftCommit(Family.IPV4)(Transaction(delete_table=True)))
    thread.start()
    write_end = open_when_reader_exists(fifo)
    wait_until(lambda: bool(caplog.messages), "a log line about the running program")
    os.close(write_end)
    thread.join(GUARD)
    assert caplog.messages[0].startswith("nft is still running after ")


def test_stop_kills_running_commands_and_prevents_new_ones(tmp_path: Path) -> None:
    runner, fifo = CommandRunner(), tmp_path / "never"
    os.mkfifo(fifo)
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(runner.run(["cat", str(fifo)], timeout=GUARD).code))
    thread.start()
    write_end = open_when_reader_exists(fifo)
    runner.stop()
    thread.join(GUARD)
    os.close(write_end)
    assert ended == [-9]
    with pytest.raises(CommandError, match=r"^cannot run true: kproxy is shutting down$"):
        runner.run(["true"], timeout=GUARD)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb\n", "a"), ("\n  \n b \n", "b"), ("", "no error message"), ("\n\n", "no error message")],
)
def test_first_line_skips_blank_lines(text: str, expected: str) -> None:
    assert first_line(text) == expected


# Counters.


def rule_with(counter: str) -> str:
    return f"*filter\n-A INPUT -m nfacct --nfacct-name {counter}\nCOMMIT\n"


def test_rule_can_use_a_counter_once_it_exists(namespace: Namespace) -> None:
    restore = ["iptables-restore", "--noflush"]
    assert namespace.run(restore, rule_with("kproxy_test"), check=False).returncode != 0
    namespace.call(lambda: ensure_counters(["kproxy_other", "kproxy_test"]))
    namespace.run(restore, rule_with("kproxy_test"))
    namespace.run(restore, rule_with("kproxy_other"))


def test_existing_counters_are_kept(namespace: Namespace) -> None:
    for _ in range(2):
        namespace.call(lambda: ensure_counters(["kproxy_test"]))
    namespace.call(lambda: ensure_counters(["kproxy_test", "kproxy_new"]))
    namespace.run(["iptables-restore", "--noflush"], rule_with("kproxy_new"))


def unprivileged(namespace: Namespace, script: str) -> str:
    """Run a script as root without capabilities. UID 0 can still read the checkout."""
    return namespace.run(["setpriv", "--bounding-set=-all", PYTHON, "-c", script]).stdout.strip()


def test_creating_counters_needs_the_capability(namespace: Namespace) -> None:
    script = (
        "from kproxy.host.nfacct import ensure_counters\n"
        "try: ensure_counters(['kproxy_test'])\n"
        "except OSError as error: print(error.strerror)\n"
    )
    assert unprivileged(namespace, script) == "Operation not permitted"


def test_rejected_request_raises_with_the_reason(namespace: Namespace) -> None:
    def ask() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            netlink.request(nfnl_type(NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_NEW), NLM_F_CREATE, nfgenmsg())

    with pytest.raises(NetlinkError, match="Invalid argument"):
        namespace.call(ask)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [(b"", b"\4\0\1\0"), (b"abc\0", b"\10\0\1\0abc\0"), (b"abcd\0", b"\t\0\1\0abcd\0\0\0\0")],
)
def test_attributes_are_padded_to_four_bytes(payload: bytes, expected: bytes) -> None:
    if sys.byteorder == "big":
        pytest.skip("the expected bytes are those of a little-endian machine")
    assert attribute(1, payload) == expected


# The installed iptables.

ERROR_CASES = [
    pytest.param(variant, case, id=f"{variant}: {name}")
    for variant, cases in VARIANTS.items()
    for name, case in cases.items()
    if name not in {"lock held", "not root"}
]


@pytest.mark.parametrize(("variant", "case"), ERROR_CASES)
def test_iptables_errors_match_those_of_the_unit_tests(
    namespace: Namespace, tmp_path: Path, variant: str, case: Case
) -> None:
    if reason := missing_variant(variant, namespace):
        pytest.skip(reason)
    link_programs(programs_of(variant), tmp_path)
    command = ["env", f"PATH={tmp_path}:{os.environ['PATH']}"]
    version = parse_version(namespace.run([*command, "iptables", "--version"]).stdout)
    done = namespace.run([*command, "iptables-restore", "--noflush"], case.text, check=False)
    if version.number == (1, 8, 9):
        assert (done.returncode, done.stderr) == (case.code, case.stderr)
    assert case.reason in str(make_restore_error("iptables-restore", done.returncode, done.stderr, lines_of(case.text)))


@pytest.mark.parametrize("family", Family)
def test_installed_iptables_applies_saves_and_rejects_rules(namespace: Namespace, family: Family) -> None:
    iptables = IptablesRunner(family)

    def save() -> list[str]:
        with iptables.save() as lines:
            return [line.strip() for line in lines if "KUBE" in line]

    namespace.call(lambda: iptables.restore("*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\nCOMMIT\n"))
    assert namespace.call(save) == [":KUBE-A - [0:0]", "-A KUBE-A -j RETURN"]
    with pytest.raises(RestoreError, match=r"tables-restore failed with status \d+: ") as caught:
        namespace.call(lambda: iptables.restore("*nat\n:KUBE-B - [0:0]\n-A KUBE-B --frobnicate\nCOMMIT\n"))
    assert caught.value.line == "-A KUBE-B --frobnicate"
    assert namespace.call(save) == [":KUBE-A - [0:0]", "-A KUBE-A -j RETURN"]
    assert iptables.version().number >= (1, 4)


def test_foreign_comment_need_not_be_utf8(namespace: Namespace) -> None:
    script = r"printf '*filter\n-A INPUT -m comment --comment \377 -j ACCEPT\nCOMMIT\n' | iptables-restore --noflush"
    namespace.run(["sh", "-c", script])

    def save() -> int:
        with IptablesRunner(Family.IPV4).save() as lines:
            return sum(line.startswith("-A INPUT ") for line in lines)

    assert namespace.call(save) == 1


# Rules of single chains.


@pytest.mark.parametrize("family", Family)
def test_rules_of_single_chains_are_counted(namespace: Namespace, family: Family) -> None:
    rules = {"KUBE-A": 3, "KUBE-B": 0, "KUBE-C": 200}
    (other,) = set(Family) - {family}
    same_name = "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\nCOMMIT\n"
    namespace.call(lambda: IptablesRunner(other).restore(same_name))
    chains = "".join(f":{name} - [0:0]\n" for name in rules)
    ports = [(name, port) for name, count in rules.items() for port in range(1, count + 1)]
    lines = "".join(f"-A {name} -p tcp -m tcp --dport {port} -j RETURN\n" for name, port in ports)
    iptables = IptablesRunner(family)

    def count() -> dict[ChainName, int]:
        return iptables.count_rules(
            [ChainName("nat", name) for name in (*rules, "KUBE-NONE")] + [ChainName("filter", "KUBE-A")]
        )

    none = {ChainName("nat", "KUBE-NONE"): 0, ChainName("filter", "KUBE-A"): 0}
    assert set(namespace.call(count).values()) == {0}
    namespace.call(lambda: iptables.restore(f"*nat\n{chains}{lines}COMMIT\n"))
    assert namespace.call(count) == {ChainName("nat", name): count for name, count in rules.items()} | none


def test_rules_are_not_counted_without_the_capability(namespace: Namespace) -> None:
    script = (
        "from kproxy.iptables.runner import IptablesRunner\n"
        "from kproxy.iptables.names import ChainName\n"
        "from kproxy.model.types import Family\n"
        "print(IptablesRunner(Family.IPV4).count_rules([ChainName('nat', 'KUBE-A')]))"
    )
    assert namespace.run([PYTHON, "-c", script]).stdout == "{ChainName(table='nat', name='KUBE-A'): 0}\n"
    assert namespace.run(["setpriv", "--bounding-set=-net_admin", PYTHON, "-c", script]).stdout == "{}\n"


def test_interrupted_rule_count_is_retried(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def interrupted_once(family: Family, table: str, chain: str) -> int:
        counted.append(chain)
        if counted.count(chain) == 1:
            raise DumpInterruptedError(0, "interrupted")
        return count_rules(family, table, chain)

    monkeypatch.setattr("kproxy.iptables.runner.count_rules", interrupted_once)
    chains = [ChainName("nat", "KUBE-A"), ChainName("nat", "KUBE-B")]
    assert namespace.call(lambda: IptablesRunner(Family.IPV4).count_rules(chains)) == dict.fromkeys(chains, 0)
    assert counted == ["KUBE-A", "KUBE-A", "KUBE-B", "KUBE-B"]


@pytest.mark.parametrize("family", Family)
def test_rejected_line_is_found_in_any_of_the_texts(namespace: Namespace, family: Family) -> None:
    iptables = IptablesRunner(family)
    generated: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(50):
            generated.append(number)
            bad = "-A KUBE-A --frobnicate\n" if number == 30 else ""
            yield f"*nat\n:KUBE-A - [0:0]\n-A KUBE-A -p tcp -m tcp --dport {number + 1} -j RETURN\n{bad}COMMIT\n"

    with pytest.raises(RestoreError) as caught:
        namespace.call(lambda: iptables.restore_each(texts()))
    assert caught.value.line == "-A KUBE-A --frobnicate"
    found = namespace.call(lambda: iptables.list_rules([ChainName("nat", "KUBE-A")]))
    assert found == {ChainName("nat", "KUBE-A"): ["-A KUBE-A -p tcp -m tcp --dport 30 -j RETURN"]}


def test_no_command_is_started_without_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    IptablesRunner(Family.IPV4).restore_each([])
    with pytest.raises(CommandError, match="cannot run iptables-restore"):
        IptablesRunner(Family.IPV4).restore_each(["*nat\nCOMMIT\n"])
