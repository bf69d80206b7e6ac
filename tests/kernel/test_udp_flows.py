"""Which endpoint answers a UDP client that keeps its socket while the Service's endpoints change."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kproxy.host.ctnetlink import UdpConntrack
from kproxy.host.interfaces import own_addresses
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.runner import IptablesRunner, RestoreError
from kproxy.model.addresses import family_of, socket_text
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import NetlinkCommit, NftTable, TableError
from kproxy.nftables.transaction import Transaction
from kproxy.sync.conntrack_cleanup import ConntrackCleaner, ConntrackCleanup
from kproxy.sync.family_sync import Backend, FamilySync
from tests.inprocess import ReconciledProxy
from tests.kernel.test_conntrack import entries
from tests.lab import objects as lab_objects
from tests.lab.client import Answered, complete_request, open_connection
from tests.lab.modes import BOTH_MODES, mode_flag, rules_of
from tests.lab.proxy import Daemon
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab
from tests.lab.waiting import wait_until

CLUSTER_IPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
CIDRS = {Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:10:244::/48"}
FAMILIES = {4: Family.IPV4, 6: Family.IPV6}
NODE_PORT = 30053

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


class RejectingIptables(IptablesRunner):
    """The installed iptables, which rejects changes on request."""

    rejects = False

    def restore_each(self, texts: Iterable[str]) -> None:
        if self.rejects:
            raise RestoreError("rejected")
        super().restore_each(texts)


class RejectingTable(NftTable):
    """The kernel's table, which rejects changes on request."""

    rejects = False

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        if self.rejects:
            raise TableError("rejected")
        super().commit(change, generation)


class UdpProxy(ReconciledProxy):
    """kproxy's reconciler on the lab's node. Syncs when called."""

    def __init__(
        self, lab: Lab, *deltas: Delta, node_port_addresses: tuple[str, ...] | None = None, mode: str = "iptables"
    ) -> None:
        """Start with the objects of these deltas."""
        self.cleanups: list[ConntrackCleanup] = []
        self._kernels = {family: _kernel(mode, family) for family in Family}

        def context(family: Family, node: Node | None) -> Context:
            local = LocalTraffic(cidr=CIDRS[family])
            own = node_port_addresses
            chosen = None if own is None else tuple(address for address in own if family_of(address) is family)
            return Context(family, NODE, local_traffic=local, accounting=False, node_port_addresses=chosen)

        cleaner = ConntrackCleaner(
            {family: UdpConntrack(family) for family in Family},
            own_addresses,
            clock=time.monotonic,
            on_cleanup=self.cleanups.append,
        )
        super().__init__(
            {
                family: FamilySync(_backend(kernel), partial(context, family))
                for family, kernel in self._kernels.items()
            },
            min_interval=0,
            max_retry=0,
            store=Store(NODE),
            namespace=lab.node.namespace,
            after_sync=[cleaner.clean],
        )
        objects = [delta.object for delta in deltas if isinstance(delta, Upsert)]
        services = tuple(each for each in objects if isinstance(each, Service))
        slices = tuple(each for each in objects if isinstance(each, EndpointSlice))
        self.sync(Replace(Service, services), Replace(EndpointSlice, slices), Replace(Node, ()))

    def sync(self, *deltas: Delta) -> None:
        """Apply deltas and sync. The sync must succeed."""
        self.apply(*deltas)
        assert self.sync_after(), "the kernel rejected the change"

    def fail(self, *deltas: Delta) -> None:
        """Apply deltas and make their sync fail."""
        for kernel in self._kernels.values():
            kernel.rejects = True
        self.apply(*deltas)
        assert not self.sync_after()
        for kernel in self._kernels.values():
            kernel.rejects = False


def _kernel(mode: str, family: Family) -> RejectingIptables | RejectingTable:
    return RejectingTable(family, NetlinkCommit(family)) if mode == "nftables" else RejectingIptables(family)


def _backend(kernel: RejectingIptables | RejectingTable) -> Backend:
    return NftablesBackend(kernel) if isinstance(kernel, RejectingTable) else IptablesBackend(kernel)


def service(
    port: int = 53,
    node_port: int = 0,
    external_ips: Sequence[str] = (),
    vips: Sequence[str] = (),
    *,
    local: bool = False,
) -> Upsert:
    """Return the Service. With `local`, both of its traffic policies are Local."""
    found = Service(
        "demo",
        "dns",
        tuple(CLUSTER_IPS.values()),
        (ServicePort("dns", port, "UDP", node_port),),
        external_ips=tuple(external_ips),
        vips=tuple(vips),
        internal_local=local,
        external_local=local,
    )
    return Upsert(found)


def slices(
    *pods: Host, port: int = 8053, terminating: bool = False, serving: bool = True, elsewhere: Sequence[Host] = ()
) -> tuple[Upsert, ...]:
    """Return the Service's slices. The pods in `elsewhere` run on node-2. Terminating pods may still serve."""
    return tuple(
        Upsert(
            EndpointSlice(
                "demo",
                f"dns-{version}",
                "demo/dns",
                family,
                tuple(
                    Endpoint(
                        pod.address(version), node, ready=not terminating, serving=serving, terminating=terminating
                    )
                    for node, hosts in ((NODE, pods), ("node-2", elsewhere))
                    for pod in hosts
                ),
                (EndpointPort("dns", port, "UDP"),),
            )
        )
        for version, family in FAMILIES.items()
    )


DELETED = (Delete(Service, "demo", "dns"), *(Delete(EndpointSlice, "demo", f"dns-{version}") for version in FAMILIES))


@pytest.fixture
def pod(lab: Lab, servers: Servers) -> Callable[[int], Host]:
    def add(number: int) -> Host:
        found = lab.add_pod(f"pod-{number}", f"10.244.1.{number}", f"fd00:10:244:1::{number}")
        for port in (8053, 9053):
            servers.serve(found, port, "UDP")
        return found

    return add


@pytest.fixture
def client(lab: Lab) -> Host:
    return lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")


@pytest.fixture
def outsider(lab: Lab) -> Host:
    return lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")


@pytest.fixture(params=["client", "outsider"])
def any_client(request: pytest.FixtureRequest) -> Host:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Host)
    return found


@pytest.fixture
def remote_host(lab: Lab, servers: Servers) -> Host:
    """A host on another node that serves UDP on the NodePort's port number."""
    found = lab.add_pod("away", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    servers.serve(found, NODE_PORT, "UDP")
    return found


class UdpClient:
    """A UDP client that sends all its requests to one frontend from one socket."""

    def __init__(self, lab: Lab, origin: Host, address: str, port: int = 53) -> None:
        self._lab = lab
        self._version = 6 if ":" in address else 4
        self.destination = socket_text(address, port)
        self._socket = open_connection(origin, address, port, "UDP")

    def ask(self) -> str:
        """Send a request and return the name of the pod that answers. Raises `ConnectionRefusedError`."""
        answer = complete_request(self._socket, "UDP")
        assert isinstance(answer, Answered)
        return answer.pod

    def send(self) -> None:
        """Send a datagram without waiting for an answer."""
        self._socket.send(b"hello\n")

    def send_untranslated(self) -> None:
        """Send until the kernel has an entry for the flow whose destination is not translated.

        The owner of the frontend's address may answer "port unreachable". That error is cleared.
        """

        def has_entry() -> bool:
            with suppress(OSError):
                self.send()
            return self.destination in self.entries()

        wait_until(has_entry, "an entry of an untranslated flow")
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def entries(self) -> dict[str, int]:
        """Return the IDs of the kernel's entries for the frontend by reply source."""
        found = entries(self._lab.node.namespace, FAMILIES[self._version])
        return {source: number for (destination, source), number in found.items() if destination == self.destination}

    def close(self) -> None:
        self._socket.close()


AddPod = Callable[[int], Host]


@BOTH_MODES
@VERSIONS
def test_flow_moves_to_the_replacement_of_its_endpoint(
    lab: Lab, pod: AddPod, any_client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    flow = UdpClient(lab, any_client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.sync(*slices(pod(2)))
    assert flow.ask() == "pod-2"
    flow.close()


@VERSIONS
def test_hairpin_flow_moves_too(lab: Lab, pod: AddPod, version: int) -> None:
    one = pod(1)
    proxy = UdpProxy(lab, service(), *slices(one))
    flow = UdpClient(lab, one, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.sync(*slices(pod(2)))
    assert flow.ask() == "pod-2"
    flow.close()


@BOTH_MODES
@VERSIONS
def test_flow_is_rejected_without_endpoints_and_served_again_later(
    lab: Lab, pod: AddPod, client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.sync(*slices())
    with pytest.raises(ConnectionRefusedError):
        flow.ask()
    proxy.sync(*slices(pod(2)))
    assert flow.ask() == "pod-2"
    flow.close()


@BOTH_MODES
@VERSIONS
def test_flow_ends_with_its_service_and_early_flow_is_served_once_it_exists(
    lab: Lab, pod: AddPod, client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.sync(*DELETED)
    assert flow.entries() == {}
    flow.send()
    assert list(flow.entries()) == [flow.destination]
    proxy.sync(service(), *slices(pod(2)))
    assert flow.ask() == "pod-2"
    flow.close()


@VERSIONS
def test_changed_service_port_ends_flows_to_the_old_port(lab: Lab, pod: AddPod, client: Host, version: int) -> None:
    proxy = UdpProxy(lab, service(port=53), *slices(pod(1)))
    old = UdpClient(lab, client, CLUSTER_IPS[version], 53)
    assert old.ask() == "pod-1"
    proxy.sync(service(port=54))
    assert old.entries() == {}
    new = UdpClient(lab, client, CLUSTER_IPS[version], 54)
    assert new.ask() == "pod-1"
    old.close()
    new.close()


@VERSIONS
def test_flow_moves_to_a_changed_target_port(lab: Lab, pod: AddPod, client: Host, version: int) -> None:
    one = pod(1)
    proxy = UdpProxy(lab, service(), *slices(one, port=8053))
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.sync(*slices(one, port=9053))
    assert flow.ask() == "pod-1"
    assert list(flow.entries()) == [socket_text(one.address(version), 9053)]
    flow.close()


@BOTH_MODES
@VERSIONS
def test_flow_moves_after_a_failed_sync(lab: Lab, pod: AddPod, client: Host, version: int, mode: str) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    before = flow.entries()
    proxy.fail(*slices(pod(2)))
    assert flow.ask() == "pod-1"
    assert flow.entries() == before
    proxy.sync()
    assert flow.ask() == "pod-2"
    flow.close()


@VERSIONS
def test_flow_of_a_service_deleted_during_failed_syncs_is_cleaned_up(
    lab: Lab, pod: AddPod, client: Host, version: int
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)))
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    proxy.fail(*DELETED)
    proxy.sync()
    assert flow.entries() == {}
    flow.close()


@BOTH_MODES
@VERSIONS
def test_flows_to_remaining_endpoints_keep_their_entries(
    lab: Lab, pod: AddPod, client: Host, version: int, mode: str
) -> None:
    pods = {each.name: each for each in (pod(1), pod(2))}
    proxy = UdpProxy(lab, service(), *slices(*pods.values()), mode=mode)
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    name = flow.ask()
    before = flow.entries()
    proxy.sync(*slices(pods[name], pod(3)))
    proxy.sync(*slices(pods[name], terminating=True))
    assert flow.ask() == name
    assert flow.entries() == before
    flow.close()


@BOTH_MODES
@VERSIONS
def test_restart_keeps_active_flows(lab: Lab, pod: AddPod, client: Host, version: int, mode: str) -> None:
    state = (service(node_port=NODE_PORT), *slices(pod(1)))
    UdpProxy(lab, *state, mode=mode)
    flows = [
        UdpClient(lab, client, CLUSTER_IPS[version]),
        UdpClient(lab, client, lab.node.address(version), NODE_PORT),
    ]
    assert [flow.ask() for flow in flows] == ["pod-1", "pod-1"]
    before = [flow.entries() for flow in flows]
    again = UdpProxy(lab, *state, mode=mode)
    assert [cleanup.deleted for cleanup in again.cleanups] == [0, 0]
    assert [flow.ask() for flow in flows] == ["pod-1", "pod-1"]
    assert [flow.entries() for flow in flows] == before
    for flow in flows:
        flow.close()


@VERSIONS
def test_restart_moves_flows_off_endpoints_removed_meanwhile(lab: Lab, pod: AddPod, client: Host, version: int) -> None:
    UdpProxy(lab, service(), *slices(pod(1)))
    flow = UdpClient(lab, client, CLUSTER_IPS[version])
    assert flow.ask() == "pod-1"
    UdpProxy(lab, service(), *slices(pod(2)))
    assert flow.ask() == "pod-2"
    flow.close()


@BOTH_MODES
@VERSIONS
def test_node_port_and_external_ip_flows_move_too(
    lab: Lab, pod: AddPod, outsider: Host, version: int, mode: str
) -> None:
    external_ips = ("203.0.113.7", "2001:db8:7::7")
    proxy = UdpProxy(lab, service(53, NODE_PORT, external_ips), *slices(pod(1)), mode=mode)
    flows = [
        UdpClient(lab, outsider, lab.node.address(version), NODE_PORT),
        UdpClient(lab, outsider, external_ips[version == 6]),
    ]
    assert [flow.ask() for flow in flows] == ["pod-1", "pod-1"]
    proxy.sync(*slices(pod(2)))
    assert [flow.ask() for flow in flows] == ["pod-2", "pod-2"]
    for flow in flows:
        flow.close()


@BOTH_MODES
@VERSIONS
@pytest.mark.parametrize("change", ["last endpoint removed", "last endpoint not serving", "Service deleted"])
def test_flows_to_every_frontend_end_with_the_last_serving_endpoint(
    lab: Lab, pod: AddPod, client: Host, outsider: Host, *, version: int, mode: str, change: str
) -> None:
    external_ips, vips = ("203.0.113.7", "2001:db8:7::7"), ("203.0.113.8", "2001:db8:7::8")
    one = pod(1)
    proxy = UdpProxy(lab, service(53, NODE_PORT, external_ips, vips), *slices(one), mode=mode)
    flows = [
        UdpClient(lab, client, CLUSTER_IPS[version]),
        UdpClient(lab, outsider, lab.node.address(version), NODE_PORT),
        UdpClient(lab, outsider, external_ips[version == 6]),
        UdpClient(lab, outsider, vips[version == 6]),
    ]
    assert [flow.ask() for flow in flows] == ["pod-1"] * 4
    changes: dict[str, tuple[Delta, ...]] = {
        "last endpoint removed": slices(),
        "last endpoint not serving": slices(one, terminating=True, serving=False),
        "Service deleted": DELETED,
    }
    proxy.sync(*changes[change])
    assert [flow.entries() for flow in flows] == [{}] * 4
    for flow in flows:
        flow.close()


def accept_before_kproxy(lab: Lab, version: int) -> None:
    """Accept new packets before kproxy's rules in the filter table, as some CNI plugins and administrators do."""
    for chain in ("INPUT", "FORWARD"):
        lab.node.namespace.run(["ip6tables" if version == 6 else "iptables", "-w", "-I", chain, "1", "-j", "ACCEPT"])


@pytest.fixture
def remote_pod(lab: Lab, servers: Servers) -> Host:
    """A pod on another node."""
    found = lab.add_pod("far", "10.244.2.7", "fd00:10:244:2::7", node="node-2")
    servers.serve(found, 8053, "UDP")
    return found


EXTERNAL_IPS = ("203.0.113.7", "2001:db8:7::7")


@pytest.mark.parametrize("change", ["local-pod-added", "policy-cluster"])
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_flow_accepted_despite_policy_local_is_served_once_it_can_be(
    lab: Lab, pod: AddPod, remote_pod: Host, change: str, version: int
) -> None:
    """Only in iptables mode: in nftables mode, no foreign rule runs between the decision to drop and the drop."""
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    proxy = UdpProxy(lab, service(53, NODE_PORT, EXTERNAL_IPS, local=True), *slices(elsewhere=[remote_pod]))
    accept_before_kproxy(lab, version)
    flows = [
        UdpClient(lab, outsider, CLUSTER_IPS[version]),
        UdpClient(lab, outsider, EXTERNAL_IPS[version == 6]),
        UdpClient(lab, outsider, lab.node.address(version), NODE_PORT),
    ]
    for flow in flows:
        flow.send_untranslated()
    if change == "local-pod-added":
        proxy.sync(*slices(pod(1), elsewhere=[remote_pod]))
        assert [flow.ask() for flow in flows] == ["pod-1"] * 3
    else:
        proxy.sync(service(53, NODE_PORT, EXTERNAL_IPS))
        assert [flow.ask() for flow in flows] == ["far"] * 3
    for flow in flows:
        flow.close()


@pytest.mark.parametrize("restricted", [False, True], ids=["all-addresses", "some-addresses"])
@VERSIONS
def test_flows_to_the_same_port_of_another_host_are_not_touched(
    lab: Lab, pod: AddPod, remote_host: Host, version: int, restricted: bool
) -> None:
    client, addresses = pod(9), lab.node.addresses if restricted else None
    proxy = UdpProxy(lab, service(node_port=NODE_PORT), *slices(pod(1)), node_port_addresses=addresses)
    flow = UdpClient(lab, client, remote_host.address(version), NODE_PORT)
    assert flow.ask() == "away"
    before = flow.entries()
    assert len(before) == 1
    proxy.sync(*slices(pod(2)))
    proxy.sync(*DELETED)
    assert flow.entries() == before
    flow.close()


@VERSIONS
def test_flows_to_addresses_without_node_ports_are_not_touched(
    lab: Lab, pod: AddPod, servers: Servers, outsider: Host, version: int
) -> None:
    servers.serve(lab.node, NODE_PORT, "UDP")
    proxy = UdpProxy(lab, service(node_port=NODE_PORT), *slices(pod(1)), node_port_addresses=())
    flow = UdpClient(lab, outsider, lab.node.address(version), NODE_PORT)
    assert flow.ask() == NODE
    before = flow.entries()
    proxy.sync(*slices(pod(2)))
    assert flow.ask() == NODE
    assert flow.entries() == before
    flow.close()


# The daemon.


@BOTH_MODES
@VERSIONS
def test_daemon_moves_only_flows_of_removed_endpoints(
    lab: Lab, pod: AddPod, version: int, mode: str, tmp_path: Path
) -> None:
    client = lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")
    objects = tmp_path / "objects"
    objects.mkdir()
    one, two = pod(1), pod(2)
    family = FAMILIES[version].value

    def write(*pods: Host, terminating: Sequence[Host] = ()) -> None:
        endpoints = [lab_objects.endpoint(each.address(version)) for each in pods]
        endpoints += [
            lab_objects.endpoint(each.address(version), ready=False, terminating=True) for each in terminating
        ]
        found = [
            lab_objects.node(),
            lab_objects.service("dns", CLUSTER_IPS[version], port=53, protocol="UDP"),
            lab_objects.endpoint_slice("dns", endpoints, family=family, port=8053, protocol="UDP"),
        ]
        lab_objects.write(objects / "dns.yaml", found)

    def flows_to(host: Host) -> bool:
        return list(flow.entries()) == [socket_text(host.address(version), 8053)]

    write(one)

    def routes_to(host: Host) -> bool:
        return socket_text(host.address(version), 8053) in rules_of(mode, lab.node.namespace).destinations()

    with Daemon(lab, objects, tmp_path / "first.log", mode_flag(mode)):
        wait_until(lambda: routes_to(one), "rules for the first endpoint")
        flow = UdpClient(lab, client, CLUSTER_IPS[version])
        assert flow.ask() == "pod-1"
        entries_before = flow.entries()
        write(two, terminating=[one])
        wait_until(lambda: routes_to(two), "rules for the second endpoint")
        assert flow.ask() == "pod-1"
        assert flow.entries() == entries_before, "the flow of a terminating endpoint was cut"
        write(two)
        wait_until(lambda: flow.entries() == {}, "the entry of the removed endpoint to be deleted")
        assert flow.ask() == "pod-2"
        entries_before = flow.entries()
    with Daemon(lab, objects, tmp_path / "second.log", mode_flag(mode)):
        wait_until(lambda: ": synced " in (tmp_path / "second.log").read_text(), "the first sync after the restart")
        assert flow.ask() == "pod-2"
        assert flow.entries() == entries_before, "the restart cut an active flow"
    assert flows_to(two)
    flow.close()
