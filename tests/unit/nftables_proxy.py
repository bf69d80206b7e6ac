"""A proxy of one family in nftables mode on a fake table, with Services and EndpointSlices for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from ipaddress import ip_address

from kproxy.model.context import Context
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.nftables.backend import BATCH_FRONTENDS, NftablesBackend
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable, TableState
from tests.inprocess import SingleFamilyProxy

IPV4 = Family.IPV4
CONTEXT = Context(IPV4, "node-1", node_port_addresses=("10.99.0.2",), localhost_traffic="proxy-hold")
FIRST = 101
"""The first endpoint number of most tests. Numbers from 101 to 199 sort the same as numbers and as text."""


class NftablesProxy(SingleFamilyProxy):
    """The IPv4 family in nftables mode on a fake table."""

    def __init__(
        self,
        *,
        batch_frontends: int = BATCH_FRONTENDS,
        kernel: FakeTable | None = None,
        store: Store | None = None,
    ) -> None:
        self.kernel = kernel or FakeTable(IPV4)
        backend = NftablesBackend(self.kernel, batch_frontends=batch_frontends)
        super().__init__(backend, CONTEXT, store=store, large_cluster_endpoints=math.inf)

    @property
    def table(self) -> TableState:
        return self.kernel.existing_table

    def restart_process(self, batch_frontends: int = BATCH_FRONTENDS) -> None:
        """Continue as a new process on the same table."""
        self.restart(NftablesBackend(self.kernel, batch_frontends=batch_frontends))

    def checked_sync(self) -> list[Transaction]:
        """Sync and return the transactions; check that the table is the one that a first sync would create."""
        before = len(self.kernel.commits)
        self.sync()
        assert self.kernel.table == self.table_of_first_sync()
        assert self.verify()
        return self.kernel.commits[before:]

    def table_of_first_sync(self) -> TableState:
        """Return the table that a first sync of the same objects creates."""
        return NftablesProxy(store=self.store).sync().table


def service(name: str, ip: str, *ports: ServicePort, affinity: int = 0) -> Service:
    """Return a Service in namespace `ns`; `affinity` is the session affinity timeout in seconds."""
    return Service("ns", name, (ip,), ports or (ServicePort("", 80, "TCP"),), affinity_seconds=affinity)


def endpoint_slice(owner: str, numbers: Iterable[int], *ports: EndpointPort, node: str = "node-9") -> EndpointSlice:
    """Return an EndpointSlice of the Service `owner`; endpoint N has the address 10.244.0.0 + N."""
    endpoints = tuple(Endpoint(str(ip_address("10.244.0.0") + number), node) for number in numbers)
    return EndpointSlice("ns", f"{owner}-1", f"ns/{owner}", IPV4, endpoints, ports or (EndpointPort("", 8080, "TCP"),))


def synced_proxy(endpoints: int = 10, *, kernel: FakeTable | None = None) -> NftablesProxy:
    """Return a proxy that has programmed the Service `web` with so many endpoints, the first of them `FIRST`."""
    proxy = NftablesProxy(kernel=kernel)
    proxy.put(service("web", "10.96.0.1"), endpoint_slice("web", range(FIRST, FIRST + endpoints))).checked_sync()
    return proxy


def nonempty_fields(transaction: Transaction) -> set[str]:
    """Return the names of the fields of a transaction that are not empty."""
    return {name for name in transaction.__struct_fields__ if getattr(transaction, name)}
