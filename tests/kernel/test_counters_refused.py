"""A kernel that refuses counters in elements of maps: the family works without them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pytest

from kproxy.app.backends import make_families
from kproxy.config import Config
from kproxy.config.types import KproxySection
from kproxy.host.netlink import BatchRejectedError, BatchSocket, RejectedMessage
from kproxy.host.netlink_message import nfnl_type
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWSET
from kproxy.model.delta import Replace
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.nftables.kernel import NetlinkCommit, NftCommit
from kproxy.nftables.probe import PROBE_TABLE, why_no_counters
from tests.kernel.test_nftables_commit import dump_table
from tests.lab.namespace import Namespace

COUNTING = Config(mode="nftables", kproxy=KproxySection(connection_counters=True))
WARNING = "IPv4: kproxy.connectionCounters: running without connection counters, because the kernel rejects them: "
Batch = Sequence[tuple[int, int, bytes]]


@pytest.fixture
def store() -> Store:
    store = Store("node-1")
    port = ServicePort("http", 80, "TCP")
    store.apply(Replace(Service, (Service("shop", "api", ("10.96.0.82",), (port,)),)))
    slice_port = EndpointPort("http", 8080, "TCP")
    endpoints = (Endpoint("10.244.1.5"),)
    store.apply(
        Replace(EndpointSlice, (EndpointSlice("shop", "api-x", "shop/api", Family.IPV4, endpoints, (slice_port,)),))
    )
    store.apply(Replace(Node, (Node("node-1"),)))
    return store


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer batches with maps whose elements have counters as a kernel does that does not support these."""
    submit = BatchSocket._submit

    def refuse(self: BatchSocket, messages: Batch, generation: int | None, *, end: bool) -> None:
        for index, (kind, _, payload) in enumerate(messages):
            if kind == nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWSET) and b"counter\0" in payload:
                raise BatchRejectedError([RejectedMessage(index, errno.EOPNOTSUPP, "Operation not supported")])
        submit(self, messages, generation, end=end)

    monkeypatch.setattr(BatchSocket, "_submit", refuse)


def sync(node: Namespace, config: Config, store: Store) -> str:
    """Run a sync and return the table."""
    families = node.call(lambda: make_families(config, []))
    node.call(lambda: families[Family.IPV4].sync(store))
    return node.run(["nft", "list", "table", "ip", "kube-proxy"]).stdout


def test_rules_are_programmed_without_counters(
    namespaces: Callable[[], Namespace], refusing: None, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    node, plain = namespaces(), namespaces()
    assert "10.96.0.82" in sync(node, COUNTING, store)
    sync(plain, Config(mode="nftables"), store)
    assert dump_table(node, Family.IPV4) == dump_table(plain, Family.IPV4)
    sync(node, COUNTING, store)
    warnings = [each for each in caplog.messages if each.startswith(WARNING)]
    assert len(warnings) == 2  # one for each start
    assert all("Operation not supported" in each for each in warnings)


def test_counters_are_used_where_they_work(
    namespaces: Callable[[], Namespace], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    node, plain = namespaces(), namespaces()
    assert "counter" in sync(node, COUNTING, store)
    sync(plain, Config(mode="nftables"), store)
    assert dump_table(node, Family.IPV4) != dump_table(plain, Family.IPV4)
    assert "connectionCounters" not in caplog.text


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("kind", [NetlinkCommit, NftCommit])
def test_the_probe_leaves_nothing_behind(
    namespaces: Callable[[], Namespace], family: Family, kind: type[NetlinkCommit | NftCommit]
) -> None:
    node = namespaces()
    assert node.call(lambda: why_no_counters(family, kind(family))) == ""
    assert PROBE_TABLE not in node.run(["nft", "list", "ruleset"]).stdout


def test_the_probe_with_nft_gives_the_reason(
    namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/none")
    reason = namespaces().call(lambda: why_no_counters(Family.IPV4, NftCommit(Family.IPV4)))
    assert reason == "cannot run nft: No such file or directory"
