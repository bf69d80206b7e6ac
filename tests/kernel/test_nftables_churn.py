"""1000 changes during hundreds of new connections a second: no connection fails and the final table is correct."""

from __future__ import annotations

import logging
import math
import os
import random
from functools import partial
from pathlib import Path

import pytest

from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Replace
from kproxy.model.types import EndpointSlice, Family, Node, Service
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import NetlinkCommit, NftTable
from kproxy.sync.family_sync import FamilySync
from tests.inprocess import InProcessProxy
from tests.lab.churn import NODE_PORT as FIRST_NODE_PORT
from tests.lab.churn import NODES, PORT, STABLE_SERVICES, Churn, addresses_on
from tests.lab.client import Answered
from tests.lab.connection_load import AddressServers, ConnectionLoad, UntranslatedPackets
from tests.lab.modes import NFT_FAMILIES, TABLE, table_state
from tests.lab.namespace import Namespace
from tests.lab.servers import Servers
from tests.lab.topology import NODE, NODE_ADDRESSES, Lab
from tests.lab.web_service import CLUSTER_IPS, WebService

log = logging.getLogger(__name__)

SEED = "CHURN_SEED"
"""The environment variable with the seed of a run to repeat."""

CHANGES = 1000
LARGEST_BATCH = 8
CONNECTIONS_PER_CHANGE = 12
CONNECTIONS_AFTERWARDS = 2000
RESTART_PROBABILITY = 0.05
"""The probability that a new process takes over the tables after a batch."""

CIDRS = {Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:10:244::/48"}
NODE_OBJECT = Node(NODE, addresses=NODE_ADDRESSES)


class ChurnProxy(InProcessProxy):
    """A proxy of both families in nftables mode in a namespace. A new one acts as a new process."""

    def __init__(self, node: Namespace, churn: Churn) -> None:
        """Start with all objects and the existing tables."""
        families = {
            family: FamilySync(
                NftablesBackend(NftTable(family, NetlinkCommit(family)), batch_frontends=25),
                partial(_context, family),
                large_cluster_endpoints=math.inf,
            )
            for family in Family
        }
        super().__init__(families, namespace=node)
        services, slices = churn.objects()
        self.apply(Replace(Node, (NODE_OBJECT,)), Replace(Service, services), Replace(EndpointSlice, slices)).sync()


def _context(family: Family, node: Node | None) -> Context:
    assert node is not None
    own = tuple(each for each in node.addresses if (":" in each) == (family is Family.IPV6))
    return Context(
        family,
        NODE,
        node_address=own[0],
        local_traffic=LocalTraffic(cidr=CIDRS[family]),
        node_port_addresses=own[:1],
        accounting=False,
        drop_invalid=False,
    )


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path) -> WebService:
    folder = tmp_path / "objects"
    folder.mkdir()
    return WebService(lab, servers, folder, "TCP")


def test_no_connection_fails_during_changes(lab: Lab, tmp_path: Path) -> None:
    seed = int(os.environ.get(SEED) or random.randrange(1 << 32))
    churn, sizes = Churn(seed), random.Random(seed)
    node = lab.node.namespace
    machines = [lab.add_pod(f"pods-{name}", *addresses_on(name), node=name).namespace for name in NODES]
    inside = lab.add_pod("client", "10.244.1.250", "fd00:10:244:1::250")
    outside = lab.add_client("visitor", "198.51.100.10", "2001:db8:51::10")
    AddressServers(tmp_path, machines, PORT)
    watch = UntranslatedPackets(
        node, churn.frontends(), [FIRST_NODE_PORT + number for number in range(STABLE_SERVICES)]
    )
    proxy = ChurnProxy(node, churn)
    with ConnectionLoad(churn.targets(inside, outside), tmp_path) as load:
        load.settle()
        changes = 0
        while changes < CHANGES:
            count = min(sizes.randint(1, LARGEST_BATCH), CHANGES - changes)
            proxy.apply(*churn.batch(count)).sync()
            changes += count
            if sizes.random() < RESTART_PROBABILITY:
                proxy = ChurnProxy(node, churn)
            load.wait_for(changes * CONNECTIONS_PER_CHANGE)
        load.settle()
        log.info("seed %d: %d changes, %.0f connections a second", seed, changes, load.rate)
    assert load.failures() == [], f"seed {seed}"
    assert load.total >= CHANGES * CONNECTIONS_PER_CHANGE
    with ConnectionLoad(churn.targets(inside, outside, now=True), tmp_path) as last:
        last.wait_for(CONNECTIONS_AFTERWARDS)
        last.settle()
    assert last.failures() == [], f"seed {seed}, afterwards"
    assert watch.seen() == [], f"seed {seed}: packets left untranslated"
    assert_tables_are_correct(node, churn, seed)


def assert_tables_are_correct(node: Namespace, churn: Churn, seed: int) -> None:
    """Check that the tables equal those of the same objects on an empty node."""
    fresh = Namespace("fresh")
    try:
        ChurnProxy(fresh, churn)
        for family in NFT_FAMILIES:
            expected = table_state(fresh, family)
            assert expected
            assert table_state(node, family) == expected, f"seed {seed}"
    finally:
        fresh.close()


# A packet that traverses the table during a commit may see some objects from before and some from after it.


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("before", [2, 3, 5, 12, 27])
def test_packet_with_the_previous_verdict_finds_a_new_endpoint(
    lab: Lab, web: WebService, version: int, before: int
) -> None:
    """The map already contains a single endpoint, but the verdict still jumps to the chain for several."""
    pods = [web.pod(number) for number in range(1, before + 1)]
    web.apply_service(pods)
    family = NFT_FAMILIES[version == 6]
    for number in range(1, before):
        key = f"{CLUSTER_IPS[version]} . tcp . 80 . {number}"
        lab.node.namespace.run(["nft", "delete", "element", family, TABLE, "service-endpoints", f"{{ {key} }}"])
    answers = {web.send_request(web.client, CLUSTER_IPS[version]) for _ in range(50)}
    assert len(answers) == 1
    assert isinstance(answers.pop(), Answered)


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_untranslated_packet_does_not_leave_the_node(lab: Lab, web: WebService, version: int) -> None:
    """It passed nat/prerouting before the frontend had endpoints."""
    watch = UntranslatedPackets(lab.node.namespace, [*CLUSTER_IPS.values()], [])
    web.apply_service([web.pod(1)])
    family = NFT_FAMILIES[version == 6]
    key = f"{CLUSTER_IPS[version]} . tcp . 80"
    lab.node.namespace.run(["nft", "delete", "element", family, TABLE, "service-ips", f"{{ {key} }}"])
    for origin in (web.client, web.outsider, web.node):
        assert web.refuses(origin, CLUSTER_IPS[version]), origin.name
    assert watch.seen() == []
