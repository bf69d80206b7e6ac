"""Whether nftables mode works here is found out without leaving anything behind; if it does not, one line says why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import pytest

from kproxy.host.netlink_message import attributes
from kproxy.model.types import Family
from kproxy.nftables.expressions import encode_statement
from kproxy.nftables.kernel import NetlinkCommit, NftCommit, TableError
from kproxy.nftables.probe import PROBE_TABLE, choose_commit, probe_transaction
from kproxy.nftables.ruleset import MapValue, Statement
from kproxy.nftables.transaction import Transaction
from tests.kernel.test_nftables_commit import held, statements
from tests.lab.namespace import Namespace

ASK = """
import logging
from kproxy.model.types import Family
from kproxy.nftables.probe import NftablesUnsupportedError, choose_commit
logging.basicConfig(format="%(message)s")
try:
    print(type(choose_commit(Family.IPV4)).__name__)
except NftablesUnsupportedError as error:
    print("unsupported:", error)
"""


@pytest.mark.parametrize("family", Family)
def test_the_kernel_takes_everything_and_nothing_stays(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    assert isinstance(node.call(lambda: choose_commit(family)), NetlinkCommit)
    assert node.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("family", Family)
def test_a_table_in_use_stays_as_it_is(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    made = probe_transaction(family)
    made.delete_table = False
    node.call(lambda: NetlinkCommit(family)(made))
    before = held(node, family)
    node.call(lambda: choose_commit(family))
    assert held(node, family) == before


@pytest.mark.parametrize("family", Family)
def test_nft_takes_the_same(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    node.call(lambda: NftCommit(family, PROBE_TABLE)(probe_transaction(family)))
    assert node.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("family", Family)
def test_every_part_of_the_kernel_that_rules_need_is_asked_for(family: Family) -> None:
    probed = [
        statement
        for chain in probe_transaction(family).added_rules
        for rule in chain.rules
        for statement in rule.statements
    ]
    assert kernel_expressions(probed, family) == kernel_expressions(statements(family), family)
    assert {found.value for found in probe_transaction(family).added_sets} == set(MapValue)
    assert any(found.timeout for found in probe_transaction(family).added_sets)


def kernel_expressions(found: Iterable[Statement], family: Family) -> set[bytes]:
    """The names of the expressions that the kernel needs for statements: each may be a module."""
    encoded = [part for statement in found for part in encode_statement(statement, family)]
    return {part[slice(*attributes(part, 4, len(part))[1])] for part in encoded}


def test_what_the_kernel_does_not_take_by_netlink_goes_by_nft(
    namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: NetlinkCommit, change: Transaction, generation: int | None = None) -> None:
        raise TableError("rule 1 of chain services: Invalid argument")

    monkeypatch.setattr(NetlinkCommit, "__call__", refuse)
    assert isinstance(namespaces().call(lambda: choose_commit(Family.IPV4)), NftCommit)
    assert "falling back to the program nft, which is slower" in caplog.text
    assert "rule 1 of chain services: Invalid argument" in caplog.text


def test_without_the_privilege_one_line_says_so(namespaces: Callable[[], Namespace]) -> None:
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = namespaces().run([*drop, sys.executable, "-c", ASK])
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("unsupported: Linux ")
    assert "Operation not permitted" in done.stdout
    assert "the capability CAP_NET_ADMIN" in done.stdout


def test_in_a_namespace_of_its_own_it_works_without_privileges_outside(namespaces: Callable[[], Namespace]) -> None:
    done = namespaces().run(["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", ASK], check=False)
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout == "NetlinkCommit\n"


def test_the_reason_names_both_ways(namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = namespaces().run([*drop, "env", "PATH=/none", sys.executable, "-c", ASK])
    assert "with nft: cannot run nft: No such file or directory" in done.stdout
