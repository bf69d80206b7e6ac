"""The probe for nftables mode leaves nothing behind, and one line explains why the mode does not work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import pytest

from kproxy.host.netlink_message import attributes
from kproxy.model.types import Family
from kproxy.nftables.expressions import encode_statement
from kproxy.nftables.kernel import NetlinkCommit, NftCommit, TableError
from kproxy.nftables.probe import PROBE_TABLE, choose_commit, probe_transaction
from kproxy.nftables.ruleset import MapValue, MatchSocket, Statement
from kproxy.nftables.transaction import Transaction
from tests.kernel.test_nftables_commit import dump_table, statements
from tests.lab.namespace import Namespace

PROBE_SCRIPT = """
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
def test_kernel_accepts_the_probe_and_nothing_remains(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    assert isinstance(node.call(lambda: choose_commit(family)), NetlinkCommit)
    assert node.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("family", Family)
def test_existing_probe_table_is_not_changed(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    made = probe_transaction(family)
    made.delete_table = False
    node.call(lambda: NetlinkCommit(family)(made))
    before = dump_table(node, family)
    node.call(lambda: choose_commit(family))
    assert dump_table(node, family) == before


@pytest.mark.parametrize("family", Family)
def test_nft_accepts_the_probe(namespaces: Callable[[], Namespace], family: Family) -> None:
    node = namespaces()
    node.call(lambda: NftCommit(family, PROBE_TABLE)(probe_transaction(family)))
    assert node.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("family", Family)
def test_probe_covers_all_kernel_features_that_rules_need(family: Family) -> None:
    probed = [
        statement
        for chain in probe_transaction(family).added_rules
        for rule in chain.rules
        for statement in rule.statements
    ]
    needed = [each for each in statements(family) if not isinstance(each, MatchSocket)]  # probed by `matches_sockets`
    assert kernel_expressions(probed, family) == kernel_expressions(needed, family)
    assert {found.value for found in probe_transaction(family).added_sets} == set(MapValue)
    assert any(found.timeout for found in probe_transaction(family).added_sets)


def kernel_expressions(found: Iterable[Statement], family: Family) -> set[bytes]:
    """Return the names of the kernel expressions that statements need. Each may be a kernel module."""
    encoded = [part for statement in found for part in encode_statement(statement, family)]
    return {part[slice(*attributes(part, 4, len(part))[1])] for part in encoded}


def test_nft_is_used_when_the_kernel_rejects_netlink_messages(
    namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reject(self: NetlinkCommit, change: Transaction, generation: int | None = None) -> None:
        raise TableError("rule 1 of chain services: Invalid argument")

    monkeypatch.setattr(NetlinkCommit, "__call__", reject)
    assert isinstance(namespaces().call(lambda: choose_commit(Family.IPV4)), NftCommit)
    assert "falling back to the program nft, which is slower" in caplog.text
    assert "rule 1 of chain services: Invalid argument" in caplog.text


def test_missing_capability_is_reported_in_one_line(namespaces: Callable[[], Namespace]) -> None:
    without_net_admin = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = namespaces().run([*without_net_admin, sys.executable, "-c", PROBE_SCRIPT])
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("unsupported: Linux ")
    assert "Operation not permitted" in done.stdout
    assert "the capability CAP_NET_ADMIN" in done.stdout


def test_probe_works_as_root_of_a_user_namespace(namespaces: Callable[[], Namespace]) -> None:
    namespace = namespaces()
    as_root_of_user_namespace = ["unshare", "--user", "--map-root-user", "--net"]
    available = namespace.run([*as_root_of_user_namespace, "true"], check=False)
    if available.returncode:
        pytest.skip(f"no user namespaces here: {available.stderr.strip()}")
    done = namespace.run([*as_root_of_user_namespace, sys.executable, "-c", PROBE_SCRIPT])
    assert done.stdout == "NetlinkCommit\n"


def test_reason_covers_netlink_and_nft(namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    without_net_admin = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = namespaces().run([*without_net_admin, "env", "PATH=/none", sys.executable, "-c", PROBE_SCRIPT])
    assert "with nft: cannot run nft: No such file or directory" in done.stdout
