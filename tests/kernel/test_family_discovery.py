"""kproxy detects unsupported IP families at start, logs one line, and programs the other family."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kproxy.app.iptables_families import discover_iptables
from kproxy.app.nftables_families import discover_nftables
from kproxy.host import nf_tables as nft_nat
from kproxy.host.commands import PROBE_TIMEOUT_SECONDS, CommandError, InconclusiveError, run
from kproxy.host.netlink import BatchSocket
from kproxy.host.nf_tables import nat_unsupported_reason
from kproxy.iptables.runner import check_tables, parse_version
from kproxy.model.types import Family
from kproxy.nftables.kernel import NetlinkCommit, TableError
from kproxy.nftables.probe import NftablesUnsupportedError, probe_transaction
from kproxy.nftables.transaction import Transaction
from tests.kernel.test_cleanup import rules
from tests.lab.iptables import PREFIXES, link_programs, missing_variant, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.transaction_monitor import TransactionMonitor
from tests.recordings import GOLDEN

OTHER = {Family.IPV4: Family.IPV6, Family.IPV6: Family.IPV4}
LEGACY = parse_version("iptables v1.8.9 (legacy)")


@pytest.fixture
def wrap_program(
    namespaces: Callable[[], Namespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """Use iptables-legacy, with a shell script in front of one of its programs. The script can run it as `$REAL`."""
    if reason := missing_variant("legacy", namespaces()):
        pytest.skip(reason)
    real = tmp_path / "real"
    real.mkdir()
    link_programs(programs_of("legacy"), real)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{real}", prepend=os.pathsep)

    def script(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nREAL={real / name}\n{text}\n")
        path.chmod(0o755)

    return script


def without_nat(family: Family) -> tuple[str, str]:
    """Return the program and its error on a kernel without the module iptable_nat or ip6table_nat."""
    name = f"{PREFIXES[family]}-restore"
    error = f"{name}: unable to initialize table 'nat'"
    return (
        name,
        f'input=$(cat); case $input in *"*nat"*) echo "{error}" >&2; exit 2; esac; echo "$input" | $REAL "$@"',
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", Family)
def test_family_without_nat_in_iptables_legacy_is_skipped(
    namespace: Namespace, wrap_program: Callable[[str, str], None], caplog: pytest.LogCaptureFixture, family: Family
) -> None:
    wrap_program(*without_nat(family))
    assert list(namespace.call(discover_iptables)) == [OTHER[family]]
    name = f"{PREFIXES[family]}-restore"
    assert warnings(caplog) == [
        f"skipping {family.value}: the kernel lacks one of the tables mangle, nat, filter: "
        f"{name} failed with status 2: {name}: unable to initialize table 'nat'"
    ]


def test_apply_programs_the_supported_family(node: Namespace, wrap_program: Callable[[str, str], None]) -> None:
    wrap_program(*without_nat(Family.IPV6))
    folder = GOLDEN / "dual-stack"
    command = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}", "--proxy-mode=iptables"]
    done = node.run(command)
    assert "skipping IPv6: " in done.stderr
    assert "ERROR" not in done.stderr
    assert any(line.startswith(":KUBE-SVC-") for line in rules(node, Family.IPV4))


def test_error_without_nat_names_both_families_in_one_line(
    namespace: Namespace, wrap_program: Callable[[str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    for family in Family:
        wrap_program(*without_nat(family))
    with pytest.raises(CommandError, match=r"^IPv4: the kernel lacks .* 'nat'; IPv6: the kernel lacks .* 'nat'$"):
        namespace.call(discover_iptables)
    assert warnings(caplog) == []


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_node_with_ipv4_addresses_does_not_start_without_ipv4(
    node: Namespace, wrap_program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """It would look healthy without rules for any IPv4 Service."""
    if mode == "iptables":
        wrap_program(*without_nat(Family.IPV4))
        with pytest.raises(CommandError, match=r"^IPv4: the kernel lacks one of the tables"):
            node.call(discover_iptables)
        with pytest.raises(CommandError, match=r"; IPv4 cannot be skipped: this node has the address [0-9.]+$"):
            node.call(discover_iptables)
    else:
        reject_nat(monkeypatch, {Family.IPV4})
        with pytest.raises(NftablesUnsupportedError, match=r"^IPv4: Linux .* rejected the table over netlink"):
            node.call(discover_nftables)


def test_link_local_address_does_not_require_ipv4(
    namespace: Namespace, wrap_program: Callable[[str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    namespace.run(["ip", "address", "add", "169.254.20.10/32", "dev", "lo"])
    wrap_program(*without_nat(Family.IPV4))
    assert list(namespace.call(discover_iptables)) == [Family.IPV6]
    assert "skipping IPv4" in caplog.text


@pytest.mark.parametrize("program", ["ip6tables", "ip6tables-restore"])
def test_hanging_program_does_not_skip_a_family(
    namespace: Namespace,
    wrap_program: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    program: str,
) -> None:
    os.mkfifo(tmp_path / "never")
    wrap_program(program, f"cat {tmp_path}/never")
    monkeypatch.setattr("kproxy.iptables.runner.PROBE_TIMEOUT_SECONDS", 1)
    with pytest.raises(InconclusiveError, match=f"{program} timed out after 1 s"):
        namespace.call(discover_iptables)


@pytest.mark.parametrize("program", ["ip6tables", "ip6tables-restore"])
def test_killed_program_does_not_skip_a_family(
    namespace: Namespace, wrap_program: Callable[[str, str], None], program: str
) -> None:
    """The kernel kills processes when memory runs out."""
    wrap_program(program, "kill -9 $$")
    with pytest.raises(InconclusiveError, match="killed by signal 9"):
        namespace.call(discover_iptables)


@pytest.mark.parametrize(("code", "error"), [(errno.EAGAIN, InconclusiveError), (errno.ENOENT, CommandError)])
def test_temporary_failure_to_start_a_program_is_inconclusive(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[CommandError]
) -> None:
    def reject(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("subprocess.Popen", reject)
    with pytest.raises(CommandError, match=f"cannot run true: {os.strerror(code)}") as caught:
        run(["true"], timeout=PROBE_TIMEOUT_SECONDS)
    assert type(caught.value) is error


def test_hanging_nft_does_not_skip_a_family(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reject(self: NetlinkCommit, change: Transaction, generation: int | None = None) -> None:
        raise TableError("netlink: No buffer space available")

    monkeypatch.setattr(NetlinkCommit, "__call__", reject)
    os.mkfifo(tmp_path / "never")
    (tmp_path / "nft").write_text(f"#!/bin/sh\ncat {tmp_path}/never\n")
    (tmp_path / "nft").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("kproxy.nftables.probe.PROBE_TIMEOUT_SECONDS", 1)
    with pytest.raises(InconclusiveError, match="No buffer space available; nft: nft timed out after 1 s"):
        namespace.call(discover_nftables)


def test_family_without_programs_is_skipped(
    namespace: Namespace, wrap_program: Callable[[str, str], None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wrap_program("ip6tables", "exit 127")
    assert list(namespace.call(discover_iptables)) == [Family.IPV4]
    assert warnings(caplog) == ["skipping IPv6: ip6tables --version failed: no error message"]


def test_existing_legacy_tables_are_not_probed(
    namespace: Namespace, wrap_program: Callable[[str, str], None], tmp_path: Path
) -> None:
    namespace.call(lambda: check_tables(Family.IPV6, LEGACY))
    wrap_program("ip6tables-restore", f"touch {tmp_path}/started; exit 1")
    namespace.call(lambda: check_tables(Family.IPV6, LEGACY))
    assert not (tmp_path / "started").exists()


def test_held_xtables_lock_does_not_skip_a_family(
    namespace: Namespace, wrap_program: Callable[[str, str], None]
) -> None:
    wrap_program("ip6tables-restore", "echo 'Another app is currently holding the xtables lock.' >&2; exit 4")
    namespace.call(lambda: check_tables(Family.IPV6, LEGACY))


def test_probing_iptables_legacy_creates_no_rules(
    namespace: Namespace, wrap_program: Callable[[str, str], None]
) -> None:
    wrap_program("unused", "")
    namespace.call(lambda: check_tables(Family.IPV4, LEGACY))
    assert [line for line in rules(namespace, Family.IPV4) if line.startswith("-A")] == []


@pytest.mark.parametrize("family", Family)
def test_probing_nf_tables_changes_nothing(namespace: Namespace, family: Family) -> None:
    with TransactionMonitor(namespace) as commits:
        assert namespace.call(lambda: nat_unsupported_reason(family)) == ""
        assert commits.new() == []
    assert namespace.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("family", Family)
def test_nf_tables_is_not_probed_when_nat_is_in_use(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    if reason := missing_variant("nft", namespace):
        pytest.skip(reason)
    namespace.run([f"{PREFIXES[family]}-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "ACCEPT"])
    monkeypatch.setattr("kproxy.host.nf_tables.BatchSocket", None)
    assert namespace.call(lambda: nat_unsupported_reason(family)) == ""


@pytest.mark.parametrize("family", Family)
def test_family_without_nat_in_iptables_nft_is_skipped(
    namespace: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    family: Family,
) -> None:
    """This kernel supports NAT, so the probe requests an unknown chain type instead."""
    if reason := missing_variant("nft", namespace):
        pytest.skip(reason)
    link_programs(programs_of("nft"), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    unknown = nft_nat._CHAIN.replace(b"nat\0", b"not\0")
    known, family_byte = BatchSocket.check, nft_nat._ADDRESS_FAMILIES[family]

    def check(self: BatchSocket, messages: list[tuple[int, int, bytes]]) -> None:
        """Replace the chain type for one family."""
        asked = [
            (kind, flags, payload.replace(nft_nat._CHAIN, unknown) if payload[0] == family_byte else payload)
            for kind, flags, payload in messages
        ]
        known(self, asked)

    monkeypatch.setattr(BatchSocket, "check", check)
    assert list(namespace.call(discover_iptables)) == [OTHER[family]]
    assert warnings(caplog) == [
        f"skipping {family.value}: the kernel lacks one of the tables mangle, nat, filter: "
        "nf_tables rejected a chain of type nat: No such file or directory"
    ]


@pytest.mark.parametrize("family", Family)
def test_family_without_nat_is_skipped_in_nftables_mode(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: Family
) -> None:
    assert any(chain.hook and chain.hook.type == "nat" for chain in probe_transaction(family).added_chains)
    reject_nat(monkeypatch, {family})
    assert list(namespace.call(discover_nftables)) == [OTHER[family]]
    assert [line.count("\n") for line in warnings(caplog)] == [0]
    reason = f"Linux {os.uname().release} rejected the table over netlink: chain nat-prerouting: "
    said = f"skipping {family.value}: {reason}"
    assert warnings(caplog)[0].startswith(said)


def test_error_without_any_family_in_nftables_mode_is_one_line(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reject_nat(monkeypatch, set(Family))
    with pytest.raises(
        NftablesUnsupportedError, match=r"^IPv4 and IPv6: Linux .* rejected the table over netlink: [^\n]*$"
    ):
        namespace.call(discover_nftables)
    assert warnings(caplog) == []


def reject_nat(monkeypatch: pytest.MonkeyPatch, families: set[Family]) -> None:
    """Simulate a kernel without NAT for some families, on a node without nft."""
    real = NetlinkCommit.__call__

    def call(self: NetlinkCommit, change: Transaction, generation: int | None = None) -> None:
        if self._encoder._family in families:
            raise TableError("chain nat-prerouting: No such file or directory")
        real(self, change, generation)

    monkeypatch.setattr(NetlinkCommit, "__call__", call)
    monkeypatch.setenv("PATH", "/nowhere")


def test_missing_capability_is_reported(namespace: Namespace) -> None:
    script = (
        "from kproxy.iptables.runner import parse_version\n"
        "from kproxy.iptables.runner import check_tables\n"
        "from kproxy.model.types import Family\n"
        "try: check_tables(Family.IPV4, parse_version('v1.8.9 (nf_tables)'))\n"
        "except Exception as error: print(error)\n"
    )
    python = str(Path(KPROXY).with_name("python"))
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = namespace.run([*drop, python, "-c", script])
    assert done.stdout == ("cannot check the kernel's IPv4 tables: Operation not permitted\n")
