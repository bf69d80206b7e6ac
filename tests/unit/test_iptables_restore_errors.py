"""Errors of iptables-restore, parsed from the output of the real programs of iptables 1.8.9, and iptables versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kproxy.host.commands import CommandError
from kproxy.iptables.runner import IptablesVersion, RecentInput, RestoreError, make_restore_error, parse_version

LARGEST_PIPE = 16 * 65_536
"""Capacity in bytes of a pipe with 64 KiB pages, the largest page size of any architecture (pipe(7))."""


class Case(NamedTuple):
    """An input of iptables-restore, the exit status and stderr for it, and the expected error.

    `line` is the offending line, or "" if stderr does not name one.
    """

    text: str
    code: int
    stderr: str
    reason: str
    line: str


def nat(*lines: str) -> str:
    return "\n".join(["*nat", ":KUBE-A - [0:0]", *lines, "COMMIT\n"])


TRY = "Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n"
NFT, LEGACY = "iptables-restore v1.8.9 (nf_tables): ", "iptables-restore v1.8.9 (legacy): "

BAD_OPTION = nat("-A KUBE-A -j ACCEPT", "-A KUBE-A --frobnicate -j ACCEPT")
BAD_PORT = nat("-A KUBE-A -p tcp -m tcp --dport 99999 -j ACCEPT")
BAD_MATCH = nat("-A KUBE-A -m nosuch -j ACCEPT")
BAD_TARGET = nat("-A KUBE-A -j ACCEPT", "-A KUBE-A -j NOPE", "-A KUBE-A -j ACCEPT")
NO_CHAIN = "*nat\n-A KUBE-X -j ACCEPT\nCOMMIT\n"
REJECT_IN_NAT = nat("-A KUBE-A -j REJECT --reject-with icmp-port-unreachable")
IN_USE = nat(":KUBE-B - [0:0]", "-A KUBE-A -j KUBE-B") + "*nat\n:KUBE-B - [0:0]\n-X KUBE-B\nCOMMIT\n"
WITHOUT_COMMIT = "*nat\n:KUBE-A - [0:0]\n"
LONG_NAME = f"*nat\n:KUBE-{'A' * 36} - [0:0]\nCOMMIT\n"
EMPTY = nat()

FROM_NFT = {
    "unknown option": Case(
        BAD_OPTION,
        2,
        f'{NFT}unknown option "--frobnicate"\nError occurred at line: 4\n{TRY}',
        'unknown option "--frobnicate"',
        "-A KUBE-A --frobnicate -j ACCEPT",
    ),
    "bad port": Case(
        BAD_PORT,
        2,
        f"{NFT}invalid port/service `99999' specified\nError occurred at line: 3\n{TRY}",
        "invalid port/service `99999' specified",
        "-A KUBE-A -p tcp -m tcp --dport 99999 -j ACCEPT",
    ),
    "unknown match": Case(
        BAD_MATCH,
        2,
        f"{NFT}Couldn't load match `nosuch':No such file or directory\n\nError occurred at line: 3\n{TRY}",
        "Couldn't load match `nosuch':No such file or directory",
        "-A KUBE-A -m nosuch -j ACCEPT",
    ),
    "no such chain": Case(
        NO_CHAIN,
        1,
        "iptables-restore: line 2 failed: No chain/target/match by that name.\n",
        "line 2 failed: No chain/target/match by that name.",
        "-A KUBE-X -j ACCEPT",
    ),
    "name too long": Case(
        LONG_NAME,
        2,
        f"{NFT}chain name `KUBE-{'A' * 36}' too long (must be under 29 chars)\nError occurred at line: 2\n{TRY}",
        "too long (must be under 29 chars)",
        f":KUBE-{'A' * 36} - [0:0]",
    ),
    "rejected by the kernel": Case(
        REJECT_IN_NAT,
        4,
        f"{NFT}\nline 3: RULE_APPEND failed (Invalid argument): rule in chain KUBE-A\n",
        "line 3: RULE_APPEND failed (Invalid argument): rule in chain KUBE-A",
        "-A KUBE-A -j REJECT --reject-with icmp-port-unreachable",
    ),
    "chain in use": Case(
        IN_USE,
        4,
        f"{NFT}\nline 8: CHAIN_DEL failed (Device or resource busy): chain KUBE-B\n",
        "line 8: CHAIN_DEL failed (Device or resource busy): chain KUBE-B",
        "-X KUBE-B",
    ),
    "not root": Case(
        EMPTY,
        4,
        f"{NFT}Could not fetch rule set generation id: Permission denied (you must be root)\n",
        "Permission denied (you must be root)",
        "",
    ),
    # iptables-nft detects a missing target only at COMMIT, which is not the offending line.
    "no such target": Case(
        BAD_TARGET,
        2,
        f"{NFT}Chain 'NOPE' does not exist\nError occurred at line: 6\n{TRY}",
        "Chain 'NOPE' does not exist",
        "",
    ),
}

FROM_LEGACY = {
    "unknown option": Case(
        BAD_OPTION,
        2,
        f'{LEGACY}unknown option "--frobnicate"\nError occurred at line: 4\n{TRY}',
        'unknown option "--frobnicate"',
        "-A KUBE-A --frobnicate -j ACCEPT",
    ),
    "no such target": Case(
        BAD_TARGET,
        2,
        f"{LEGACY}Couldn't load target `NOPE':No such file or directory\n\nError occurred at line: 4\n{TRY}",
        "Couldn't load target `NOPE':No such file or directory",
        "-A KUBE-A -j NOPE",
    ),
    "no such chain": Case(NO_CHAIN, 1, "iptables-restore: line 2 failed\n", "line 2 failed", "-A KUBE-X -j ACCEPT"),
    "chain in use": Case(IN_USE, 1, "iptables-restore: line 8 failed\n", "line 8 failed", "-X KUBE-B"),
    "missing COMMIT": Case(
        WITHOUT_COMMIT, 1, "iptables-restore: COMMIT expected at line 3\n", "COMMIT expected at line 3", ""
    ),
    "name too long": Case(
        LONG_NAME,
        2,
        f"{LEGACY}Invalid chain name `KUBE-{'A' * 36}' (28 chars max)\nError occurred at line: 2\n{TRY}",
        "(28 chars max)",
        f":KUBE-{'A' * 36} - [0:0]",
    ),
    # The kernel rejects the whole table at COMMIT.
    "rejected by the kernel": Case(REJECT_IN_NAT, 1, "iptables-restore: line 4 failed\n", "line 4 failed", ""),
    "lock held": Case(
        EMPTY,
        4,
        "Can't lock /run/xtables.lock: Resource temporarily unavailable\n"
        "Another app is currently holding the xtables lock. Stopped waiting after 1s.\n",
        "lock",
        "",
    ),
    "not root": Case(
        EMPTY,
        4,
        "Fatal: can't open lock file /run/xtables.lock: Permission denied\n",
        "can't open lock file /run/xtables.lock: Permission denied",
        "",
    ),
}

VARIANTS = {"nft": FROM_NFT, "legacy": FROM_LEGACY}
CASES = [
    pytest.param(case, id=f"{variant}: {name}") for variant, cases in VARIANTS.items() for name, case in cases.items()
]


def lines_of(*texts: str) -> Callable[[int], str]:
    recent = RecentInput()
    assert list(recent.record(texts)) == list(texts)
    return recent.line


def error_of(case: Case) -> RestoreError:
    return make_restore_error("iptables-restore", case.code, case.stderr, lines_of(case.text))


@pytest.mark.parametrize("case", CASES)
def test_message_is_one_line_with_program_status_and_reason(case: Case) -> None:
    message = str(error_of(case))
    assert message.startswith(f"iptables-restore failed with status {case.code}: ")
    assert case.reason in message
    assert "\n" not in message
    assert "for more information" not in message


@pytest.mark.parametrize("case", CASES)
def test_error_has_the_offending_line_if_iptables_names_it(case: Case) -> None:
    error = error_of(case)
    assert error.line == case.line
    assert ("COMMIT'" in str(error)) is False
    assert repr(case.line) in str(error) if case.line else " at '" not in str(error)


def test_error_without_stderr_says_no_message() -> None:
    error = make_restore_error("iptables-restore", 1, "", lines_of(EMPTY))
    assert str(error) == "iptables-restore failed with status 1: no error message"


def test_line_number_beyond_the_input_is_ignored() -> None:
    assert make_restore_error("iptables-restore", 1, "iptables-restore: line 99 failed\n", lines_of(EMPTY)).line == ""


def test_timeout_has_no_offending_line() -> None:
    error = make_restore_error("iptables-restore", -1, "iptables-restore timed out after 900 s", lines_of(EMPTY))
    assert "timed out after 900 s" in str(error)
    assert error.line == ""


def test_lines_are_numbered_across_texts() -> None:
    line_of = lines_of("one\ntwo\n", "three\n")
    assert [line_of(number) for number in range(5)] == ["", "one", "two", "three", ""]


def test_enough_recent_lines_are_kept_to_find_the_offending_one() -> None:
    """The program may be a full pipe behind, and in addition have read lines that it has not processed yet."""
    count = 3 * LARGEST_PIPE // 1024
    line_of = lines_of(*(f"{number:<1023}\n" for number in range(1, count + 1)))
    known = [number for number in range(1, count + 1) if line_of(number)]
    assert [line_of(number).strip() for number in known] == [str(number) for number in known]
    assert known == list(range(known[0], count + 1))
    assert LARGEST_PIPE + (1 << 14) < 1024 * (len(known) - 1) < 1.5 * LARGEST_PIPE


# Versions.


@pytest.mark.parametrize(
    ("text", "version", "shown"),
    [
        ("iptables v1.8.9 (nf_tables)\n", IptablesVersion((1, 8, 9), nft=True), "iptables 1.8.9 (nf_tables)"),
        ("ip6tables v1.8.9 (legacy)\n", IptablesVersion((1, 8, 9), nft=False), "iptables 1.8.9 (legacy)"),
        ("iptables v1.4.21\n", IptablesVersion((1, 4, 21), nft=False), "iptables 1.4.21 (legacy)"),
    ],
)
def test_version_is_parsed_and_printed(text: str, version: IptablesVersion, shown: str) -> None:
    assert parse_version(text) == version
    assert str(version) == shown


@pytest.mark.parametrize(
    ("number", "expected"), [((1, 6, 1), False), ((1, 6, 2), True), ((1, 8), True), ((1, 10), True), ((2,), True)]
)
def test_random_fully_is_supported_since_1_6_2(number: tuple[int, ...], expected: bool) -> None:
    assert IptablesVersion(number, nft=False).random_fully is expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (IptablesVersion((1, 8, 4), nft=True), False),
        (IptablesVersion((1, 8, 5), nft=True), True),
        (IptablesVersion((1, 8, 9), nft=False), False),
    ],
    ids=str,
)
def test_patching_is_supported_by_iptables_nft_since_1_8_5(version: IptablesVersion, expected: bool) -> None:
    assert version.supports_patching is expected


@pytest.mark.parametrize("text", ["", "busybox\n", "iptables version unknown\n"])
def test_unparsable_version_is_an_error(text: str) -> None:
    with pytest.raises(CommandError, match="cannot parse the iptables version"):
        parse_version(text)


@pytest.mark.parametrize(
    ("stderr", "chain"),
    [
        (f"{NFT}\nline 3: RULE_APPEND failed (No such file or directory): rule in chain KUBE-SEP-A\n", "KUBE-SEP-A"),
        (f"{NFT}\nline 2: CHAIN_ADD failed (Invalid argument): chain KUBE-SVC-A\n", ""),
    ],
)
def test_chain_of_the_rejected_rule(stderr: str, chain: str) -> None:
    assert make_restore_error("iptables-restore", 4, stderr, lambda _: "COMMIT").chain == chain


def test_warnings_are_not_taken_for_the_reason() -> None:
    stderr = (
        "Warning: Extension recent revision 0 not supported, missing kernel module?\n"
        f"{NFT}\nline 7: RULE_APPEND failed (No such file or directory): rule in chain KUBE-SEP-A\n"
    )
    error = make_restore_error("iptables-restore", 4, stderr, {7: "-A KUBE-SEP-A -m recent"}.__getitem__)
    assert str(error).startswith("iptables-restore failed with status 4: line 7: RULE_APPEND failed")
    assert (error.line, error.chain) == ("-A KUBE-SEP-A -m recent", "KUBE-SEP-A")


@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (-9, "iptables-restore timed out after 60 s", True),
        (4, "Another app is currently holding the xtables lock. Stopped waiting after 5s.\n", True),
        (4, f"{NFT}Could not fetch rule set generation id: Permission denied (you must be root)\n", True),
        (3, f"{LEGACY}iptables-restore: unable to initialize table 'nat'\n", True),
        (4, f"{NFT}\nline 3: RULE_APPEND failed (Invalid argument): rule in chain KUBE-A\n", False),
        (1, "iptables-restore: line 5 failed\n", False),
    ],
)
def test_problems_that_do_not_depend_on_the_input(code: int, stderr: str, expected: bool) -> None:
    assert make_restore_error("iptables-restore", code, stderr, lambda _: "").affects_all is expected
