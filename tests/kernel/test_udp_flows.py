"""Where a UDP client that keeps its socket ends up when what is behind a Service changes."""

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


class FickleIptables(IptablesRunner):
    """The real thing, which refuses on demand."""

    refuses = False

    def restore_each(self, texts: Iterable[str]) -> None:
        if self.refuses:
            raise RestoreError("refused")
        super().restore_each(texts)


class FickleTable(NftTable):
    """A real table, which refuses on demand."""

    refuses = False

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        if self.refuses:
            raise TableError("refused")
        super().commit(change, generation)


class UdpProxy(ReconciledProxy):
    """kproxy's reconciler on the lab's node, one sync per call."""

    def __init__(
        self, lab: Lab, *deltas: Delta, node_port_addresses: tuple[str, ...] | None = None, mode: str = "iptables"
    ) -> None:
        """Start with these objects and no others."""
        self.cleanings: list[ConntrackCleanup] = []
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
            on_cleanup=self.cleanings.append,
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
        """Apply deltas and sync, which must succeed."""
        self.apply(*deltas)
        assert self.sync_after(), "the kernel rejected the change"

    def fail(self, *deltas: Delta) -> None:
        """Apply deltas and let their sync fail."""
        for kernel in self._kernels.values():
            kernel.refuses = True
        self.apply(*deltas)
        assert not self.sync_after()
        for kernel in self._kernels.values():
            kernel.refuses = False


def _kernel(mode: str, family: Family) -> FickleIptables | FickleTable:
    return FickleTable(family, NetlinkCommit(family)) if mode == "nftables" else FickleIptables(family)


def _backend(kernel: FickleIptables | FickleTable) -> Backend:
    return NftablesBackend(kernel) if isinstance(kernel, FickleTable) else IptablesBackend(kernel)


def service(port: int = 53, node_port: int = 0, external_ips: Sequence[str] = (), *, local: bool = False) -> Upsert:
    """The Service; with `local`, both of its traffic policies are Local."""
    found = Service(
        "demo",
        "dns",
        tuple(CLUSTER_IPS.values()),
        (ServicePort("dns", port, "UDP", node_port),),
        external_ips=tuple(external_ips),
        internal_local=local,
        external_local=local,
    )
    return Upsert(found)


def slices(*pods: Host, port: int = 8053, leaving: bool = False, elsewhere: Sequence[Host] = ()) -> tuple[Upsert, ...]:
    """The Service's slices; pods `elsewhere` are on another node. Pods that are leaving terminate, and still serve."""
    return tuple(
        Upsert(
            EndpointSlice(
                "demo",
                f"dns-{version}",
                "demo/dns",
                family,
                tuple(
                    Endpoint(pod.address(version), node, ready=not leaving, serving=True, terminating=leaving)
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
def anybody(request: pytest.FixtureRequest) -> Host:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Host)
    return found


@pytest.fixture
def away(lab: Lab, servers: Servers) -> Host:
    """A host beyond this node that serves UDP on the number of the NodePort."""
    found = lab.add_pod("away", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    servers.serve(found, NODE_PORT, "UDP")
    return found


class Talk:
    """A client that asks again and again from one socket, through one frontend."""

    def __init__(self, lab: Lab, origin: Host, address: str, port: int = 53) -> None:
        self._lab = lab
        self._version = 6 if ":" in address else 4
        self.destination = socket_text(address, port)
        self._socket = open_connection(origin, address, port, "UDP")

    def ask(self) -> str:
        """Return the name of the pod that answered. Raises `ConnectionRefusedError`."""
        answer = complete_request(self._socket, "UDP")
        assert isinstance(answer, Answered)
        return answer.pod

    def send(self) -> None:
        """Send something that need not be answered."""
        self._socket.send(b"anybody?\n")

    def leave_untranslated(self) -> None:
        """Send until the kernel has an entry for the flow in which the frontend is the destination itself.

        Whoever is there may answer that nobody listens: that error is taken off the socket.
        """

        def is_left() -> bool:
            with suppress(OSError):
                self.send()
            return self.destination in self.entries()

        wait_until(is_left, "an entry of an untranslated flow")
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def entries(self) -> dict[str, int]:
        """The ids of the kernel's entries for the frontend, by who answers."""
        found = entries(self._lab.node.namespace, FAMILIES[self._version])
        return {source: number for (destination, source), number in found.items() if destination == self.destination}

    def close(self) -> None:
        self._socket.close()


Pods = Callable[[int], Host]


@BOTH_MODES
@VERSIONS
def test_a_flow_follows_the_replacement_of_its_endpoint(
    lab: Lab, pod: Pods, anybody: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    talk = Talk(lab, anybody, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.sync(*slices(pod(2)))
    assert talk.ask() == "pod-2"
    talk.close()


@VERSIONS
def test_a_pods_flow_to_itself_follows_too(lab: Lab, pod: Pods, version: int) -> None:
    one = pod(1)
    proxy = UdpProxy(lab, service(), *slices(one))
    talk = Talk(lab, one, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.sync(*slices(pod(2)))
    assert talk.ask() == "pod-2"
    talk.close()


@BOTH_MODES
@VERSIONS
def test_scaled_to_zero_a_flow_is_refused_and_later_served(
    lab: Lab, pod: Pods, client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.sync(*slices())
    with pytest.raises(ConnectionRefusedError):
        talk.ask()
    proxy.sync(*slices(pod(2)))
    assert talk.ask() == "pod-2"
    talk.close()


@BOTH_MODES
@VERSIONS
def test_a_flow_to_a_deleted_service_ends_and_one_that_came_early_is_served(
    lab: Lab, pod: Pods, client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.sync(*DELETED)
    assert talk.entries() == {}
    talk.send()
    assert list(talk.entries()) == [talk.destination]
    proxy.sync(service(), *slices(pod(2)))
    assert talk.ask() == "pod-2"
    talk.close()


@VERSIONS
def test_a_changed_port_ends_the_flows_to_the_old_one(lab: Lab, pod: Pods, client: Host, version: int) -> None:
    proxy = UdpProxy(lab, service(port=53), *slices(pod(1)))
    old = Talk(lab, client, CLUSTER_IPS[version], 53)
    assert old.ask() == "pod-1"
    proxy.sync(service(port=54))
    assert old.entries() == {}
    new = Talk(lab, client, CLUSTER_IPS[version], 54)
    assert new.ask() == "pod-1"
    old.close()
    new.close()


@VERSIONS
def test_a_flow_follows_the_target_port(lab: Lab, pod: Pods, client: Host, version: int) -> None:
    one = pod(1)
    proxy = UdpProxy(lab, service(), *slices(one, port=8053))
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.sync(*slices(one, port=9053))
    assert talk.ask() == "pod-1"
    assert list(talk.entries()) == [socket_text(one.address(version), 9053)]
    talk.close()


@BOTH_MODES
@VERSIONS
def test_a_failed_sync_in_between_leaves_nothing_behind(
    lab: Lab, pod: Pods, client: Host, version: int, mode: str
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)), mode=mode)
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    before = talk.entries()
    proxy.fail(*slices(pod(2)))
    assert talk.ask() == "pod-1"
    assert talk.entries() == before
    proxy.sync()
    assert talk.ask() == "pod-2"
    talk.close()


@VERSIONS
def test_a_service_deleted_while_syncs_fail_is_cleaned_up_afterwards(
    lab: Lab, pod: Pods, client: Host, version: int
) -> None:
    proxy = UdpProxy(lab, service(), *slices(pod(1)))
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    proxy.fail(*DELETED)
    proxy.sync()
    assert talk.entries() == {}
    talk.close()


@BOTH_MODES
@VERSIONS
def test_flows_to_endpoints_that_stay_keep_their_entries(
    lab: Lab, pod: Pods, client: Host, version: int, mode: str
) -> None:
    pods = {each.name: each for each in (pod(1), pod(2))}
    proxy = UdpProxy(lab, service(), *slices(*pods.values()), mode=mode)
    talk = Talk(lab, client, CLUSTER_IPS[version])
    name = talk.ask()
    before = talk.entries()
    proxy.sync(*slices(pods[name], pod(3)))
    proxy.sync(*slices(pods[name], leaving=True))
    assert talk.ask() == name
    assert talk.entries() == before
    talk.close()


@BOTH_MODES
@VERSIONS
def test_a_restart_cuts_nothing_that_lives(lab: Lab, pod: Pods, client: Host, version: int, mode: str) -> None:
    state = (service(node_port=NODE_PORT), *slices(pod(1)))
    UdpProxy(lab, *state, mode=mode)
    talks = [
        Talk(lab, client, CLUSTER_IPS[version]),
        Talk(lab, client, lab.node.address(version), NODE_PORT),
    ]
    assert [talk.ask() for talk in talks] == ["pod-1", "pod-1"]
    before = [talk.entries() for talk in talks]
    again = UdpProxy(lab, *state, mode=mode)
    assert [cleaning.deleted for cleaning in again.cleanings] == [0, 0]
    assert [talk.ask() for talk in talks] == ["pod-1", "pod-1"]
    assert [talk.entries() for talk in talks] == before
    for talk in talks:
        talk.close()


@VERSIONS
def test_a_restart_moves_flows_whose_endpoint_died_meanwhile(lab: Lab, pod: Pods, client: Host, version: int) -> None:
    UdpProxy(lab, service(), *slices(pod(1)))
    talk = Talk(lab, client, CLUSTER_IPS[version])
    assert talk.ask() == "pod-1"
    UdpProxy(lab, service(), *slices(pod(2)))
    assert talk.ask() == "pod-2"
    talk.close()


@BOTH_MODES
@VERSIONS
def test_node_port_and_external_address_follow_too(
    lab: Lab, pod: Pods, outsider: Host, version: int, mode: str
) -> None:
    external_ips = ("203.0.113.7", "2001:db8:7::7")
    proxy = UdpProxy(lab, service(53, NODE_PORT, external_ips), *slices(pod(1)), mode=mode)
    talks = [
        Talk(lab, outsider, lab.node.address(version), NODE_PORT),
        Talk(lab, outsider, external_ips[version == 6]),
    ]
    assert [talk.ask() for talk in talks] == ["pod-1", "pod-1"]
    proxy.sync(*slices(pod(2)))
    assert [talk.ask() for talk in talks] == ["pod-2", "pod-2"]
    for talk in talks:
        talk.close()


def accept_everything_first(lab: Lab, version: int) -> None:
    """Accept new packets before our rules of table filter see them, as some CNI plugins and administrators do."""
    for chain in ("INPUT", "FORWARD"):
        lab.node.namespace.run(["ip6tables" if version == 6 else "iptables", "-w", "-I", chain, "1", "-j", "ACCEPT"])


@pytest.fixture
def far(lab: Lab, servers: Servers) -> Host:
    """A pod of another node."""
    found = lab.add_pod("far", "10.244.2.7", "fd00:10:244:2::7", node="node-2")
    servers.serve(found, 8053, "UDP")
    return found


EXTERNAL_IPS = ("203.0.113.7", "2001:db8:7::7")


@pytest.mark.parametrize("change", ["pod-comes", "policy-cluster"])
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_what_slipped_past_policy_local_is_served_once_it_can_be(
    lab: Lab, pod: Pods, far: Host, change: str, version: int
) -> None:
    """Only iptables mode: no rule of another table comes between nftables mode's decision and its drop."""
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    proxy = UdpProxy(lab, service(53, NODE_PORT, EXTERNAL_IPS, local=True), *slices(elsewhere=[far]))
    accept_everything_first(lab, version)
    talks = [
        Talk(lab, outsider, CLUSTER_IPS[version]),
        Talk(lab, outsider, EXTERNAL_IPS[version == 6]),
        Talk(lab, outsider, lab.node.address(version), NODE_PORT),
    ]
    for talk in talks:
        talk.leave_untranslated()
    if change == "pod-comes":
        proxy.sync(*slices(pod(1), elsewhere=[far]))
        assert [talk.ask() for talk in talks] == ["pod-1"] * 3
    else:
        proxy.sync(service(53, NODE_PORT, EXTERNAL_IPS))
        assert [talk.ask() for talk in talks] == ["far"] * 3
    for talk in talks:
        talk.close()


@pytest.mark.parametrize("restricted", [False, True], ids=["all-addresses", "some-addresses"])
@VERSIONS
def test_flows_to_the_same_port_of_another_host_are_not_touched(
    lab: Lab, pod: Pods, away: Host, version: int, restricted: bool
) -> None:
    client, addresses = pod(9), lab.node.addresses if restricted else None
    proxy = UdpProxy(lab, service(node_port=NODE_PORT), *slices(pod(1)), node_port_addresses=addresses)
    talk = Talk(lab, client, away.address(version), NODE_PORT)
    assert talk.ask() == "away"
    before = talk.entries()
    assert len(before) == 1
    proxy.sync(*slices(pod(2)))
    proxy.sync(*DELETED)
    assert talk.entries() == before
    talk.close()


@VERSIONS
def test_where_node_ports_do_not_answer_others_flows_stay(
    lab: Lab, pod: Pods, servers: Servers, outsider: Host, version: int
) -> None:
    servers.serve(lab.node, NODE_PORT, "UDP")
    proxy = UdpProxy(lab, service(node_port=NODE_PORT), *slices(pod(1)), node_port_addresses=())
    talk = Talk(lab, outsider, lab.node.address(version), NODE_PORT)
    assert talk.ask() == NODE
    before = talk.entries()
    proxy.sync(*slices(pod(2)))
    assert talk.ask() == NODE
    assert talk.entries() == before
    talk.close()


# The whole daemon.


@BOTH_MODES
@VERSIONS
def test_the_daemon_moves_flows_off_dead_endpoints_and_no_others(
    lab: Lab, pod: Pods, version: int, mode: str, tmp_path: Path
) -> None:
    client = lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")
    objects = tmp_path / "objects"
    objects.mkdir()
    one, two = pod(1), pod(2)
    family = FAMILIES[version].value

    def write(*pods: Host, leaving: Sequence[Host] = ()) -> None:
        endpoints = [lab_objects.endpoint(each.address(version)) for each in pods]
        endpoints += [lab_objects.endpoint(each.address(version), ready=False, terminating=True) for each in leaving]
        found = [
            lab_objects.node(),
            lab_objects.service("dns", CLUSTER_IPS[version], port=53, protocol="UDP"),
            lab_objects.endpoint_slice("dns", endpoints, family=family, port=8053, protocol="UDP"),
        ]
        lab_objects.write(objects / "dns.yaml", found)

    def flows_to(host: Host) -> bool:
        return list(talk.entries()) == [socket_text(host.address(version), 8053)]

    write(one)

    def leads_to(host: Host) -> bool:
        return socket_text(host.address(version), 8053) in rules_of(mode, lab.node.namespace).destinations()

    with Daemon(lab, objects, tmp_path / "first.log", mode_flag(mode)):
        wait_until(lambda: leads_to(one), "the first endpoint")
        talk = Talk(lab, client, CLUSTER_IPS[version])
        assert talk.ask() == "pod-1"
        known = talk.entries()
        write(two, leaving=[one])
        wait_until(lambda: leads_to(two), "the other endpoint")
        assert talk.ask() == "pod-1"
        assert talk.entries() == known, "an endpoint that still serves lost its flow"
        write(two)
        wait_until(lambda: talk.entries() == {}, "the flow to the endpoint that is gone to be forgotten")
        assert talk.ask() == "pod-2"
        known = talk.entries()
    with Daemon(lab, objects, tmp_path / "second.log", mode_flag(mode)):
        wait_until(lambda: ": synced " in (tmp_path / "second.log").read_text(), "the second start's sync")
        assert talk.ask() == "pod-2"
        assert talk.entries() == known, "a restart cut a flow that lives"
    assert flows_to(two)
    talk.close()
