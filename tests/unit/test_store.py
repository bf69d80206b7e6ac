"""The store of API objects: which Services and other state each delta changes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.model.delta import BASIC_KINDS, Delete, Delta, Invalid, Kind, Object, Replace, Upsert
from kproxy.model.store import Store, StoreChange
from kproxy.model.types import Endpoint, EndpointSlice, Family, Node, Service, ServiceCIDR
from tests.unit.strategies import deltas

NO_CHANGE = StoreChange()


def changed(*services: str, node: bool = False, appeared: str = "") -> StoreChange:
    return StoreChange(frozenset(services), node, appeared=frozenset(appeared.split()))


def applied(store: Store, delta: Delta) -> StoreChange:
    """Apply a delta. Return the change without the families, which have tests of their own."""
    return replace(store.apply(delta), families=None)


def service(name: str, address: str = "10.96.0.1") -> Service:
    return Service("ns", name, (address,), ())


def endpoint_slice(name: str, owner: str = "web", *addresses: str) -> EndpointSlice:
    return EndpointSlice("ns", name, f"ns/{owner}", Family.IPV4, tuple(map(Endpoint, addresses)))


def service_cidrs_of(store: Store) -> tuple[str, ...]:
    """Return the CIDRs. As a call, so that mypy does not narrow the attribute to the value of the last assertion."""
    return store.service_cidrs


def names(slices: Iterable[EndpointSlice]) -> set[str]:
    return {item.name for item in slices}


@pytest.fixture(name="store")
def store_with_two_services() -> Store:
    """A store with two Services, one EndpointSlice each, and this Node."""
    store = Store("node-1")
    store.apply(Replace(Service, (service("web"), service("api"))))
    store.apply(Replace(EndpointSlice, (endpoint_slice("web-1", "web"), endpoint_slice("api-1", "api"))))
    store.apply(Replace(Node, (Node("node-1"),)))
    return store


def test_store_change_is_true_if_anything_changed() -> None:
    assert not NO_CHANGE
    assert changed("ns/web")
    assert changed(node=True)
    assert StoreChange(service_cidrs=True)


def test_new_or_updated_service_is_a_change(store: Store) -> None:
    assert applied(store, Upsert(service("new"))) == changed("ns/new", appeared="ns/new")
    assert applied(store, Upsert(service("web", "10.96.0.2"))) == changed("ns/web")
    assert store.service("ns/web") == service("web", "10.96.0.2")


def test_repeated_object_is_not_a_change(store: Store) -> None:
    for known in (service("web"), endpoint_slice("web-1"), Node("node-1")):
        assert store.apply(Upsert(known)) == NO_CHANGE


def test_deleted_service_is_a_change_once(store: Store) -> None:
    assert applied(store, Delete(Service, "ns", "web")) == changed("ns/web")
    assert store.apply(Delete(Service, "ns", "web")) == NO_CHANGE
    assert store.service("ns/web") is None
    assert list(store.service_keys()) == ["ns/api"]


def test_endpoint_slice_changes_its_service(store: Store) -> None:
    assert applied(store, Upsert(endpoint_slice("web-2"))) == changed("ns/web")
    assert applied(store, Upsert(endpoint_slice("web-2", "web", "10.0.0.1"))) == changed("ns/web")
    assert names(store.slices("ns/web")) == {"web-1", "web-2"}
    assert applied(store, Delete(EndpointSlice, "ns", "web-2")) == changed("ns/web")
    assert store.apply(Delete(EndpointSlice, "ns", "web-2")) == NO_CHANGE
    assert names(store.slices("ns/web")) == {"web-1"}


def test_endpoint_slice_may_arrive_before_its_service(store: Store) -> None:
    assert applied(store, Upsert(endpoint_slice("new-1", "new"))) == changed("ns/new")
    assert store.service("ns/new") is None
    assert names(store.slices("ns/new")) == {"new-1"}


def test_endpoint_slice_that_moves_changes_both_services(store: Store) -> None:
    assert applied(store, Upsert(endpoint_slice("web-1", "api"))) == changed("ns/web", "ns/api")
    assert names(store.slices("ns/web")) == set()
    assert names(store.slices("ns/api")) == {"web-1", "api-1"}
    assert applied(store, Delete(EndpointSlice, "ns", "web-1")) == changed("ns/api")


def test_endpoint_slices_of_different_namespaces_may_share_a_name(store: Store) -> None:
    other = EndpointSlice("other", "web-1", "other/web", Family.IPV4)
    assert applied(store, Upsert(other)) == changed("other/web")
    assert applied(store, Delete(EndpointSlice, "other", "web-1")) == changed("other/web")
    assert names(store.slices("ns/web")) == {"web-1"}


def test_only_this_node_is_stored(store: Store) -> None:
    assert store.apply(Upsert(Node("node-2", zone="zone-b"))) == NO_CHANGE
    assert store.apply(Delete(Node, "", "node-2")) == NO_CHANGE
    assert applied(store, Replace(Node, (Node("node-2"), Node("node-1", zone="zone-a")))) == changed(node=True)
    assert store.node == Node("node-1", zone="zone-a")
    assert applied(store, Delete(Node, "", "node-1")) == changed(node=True)
    assert store.apply(Delete(Node, "", "node-1")) == NO_CHANGE
    assert store.node == Node("node-1", zone="zone-a", being_deleted=True)
    assert applied(store, Upsert(Node("node-1", zone="zone-b"))) == changed(node=True)
    assert store.node == Node("node-1", zone="zone-b")


def test_endpoints_that_are_ignored_are_counted(store: Store) -> None:
    def slice_with(invalid: int) -> EndpointSlice:
        return EndpointSlice("ns", "web-1", "ns/web", Family.IPV4, (), (), 0.0, invalid)

    for invalid in (2, 3, 3, 0):
        store.apply(Upsert(slice_with(invalid)))
        assert store.invalid_endpoints == invalid
    store.apply(Upsert(slice_with(5)))
    store.apply(Delete(EndpointSlice, "ns", "web-1"))
    assert store.invalid_endpoints == 0
    store.apply(Replace(EndpointSlice, (slice_with(1),)))
    assert store.invalid_endpoints == 1
    store.apply(Replace(EndpointSlice, ()))
    assert store.invalid_endpoints == 0


def test_invalid_services_are_counted_until_they_become_valid_or_are_deleted(store: Store) -> None:
    assert store.invalid_services == 0
    assert store.apply(Invalid(Service, "ns", "web")) == NO_CHANGE
    assert store.apply(Invalid(Service, "ns", "broken")) == NO_CHANGE
    store.apply(Invalid(EndpointSlice, "ns", "web-1"))
    assert store.invalid_services == 2
    assert store.service("ns/web") == service("web")
    assert store.apply(Upsert(service("web"))) == NO_CHANGE
    assert store.invalid_services == 1
    store.apply(Delete(Service, "ns", "broken"))
    assert store.invalid_services == 0
    store.apply(Replace(Service, (service("web"),), (("ns", "api"), ("ns", "other"))))
    assert store.invalid_services == 2
    store.apply(Replace(Service, (service("web"),), ignored=3))
    assert (store.invalid_services, store.ignored_services) == (0, 3)


def test_relist_changes_only_what_differs(store: Store) -> None:
    assert store.apply(Replace(Service, (service("web"), service("api")))) == NO_CHANGE
    assert applied(store, Replace(Service, (service("web"), service("new")))) == changed(
        "ns/api", "ns/new", appeared="ns/new"
    )
    assert applied(store, Replace(EndpointSlice, (endpoint_slice("web-1", "web", "10.0.0.1"),))) == changed(
        "ns/web", "ns/api"
    )
    assert applied(store, Replace(Service, ())) == changed("ns/web", "ns/new")
    assert names(store.slices("ns/web")) == {"web-1"}
    assert applied(store, Replace(Node, ())) == changed(node=True)


def test_endpoint_slice_may_move_in_a_relist(store: Store) -> None:
    assert applied(store, Replace(EndpointSlice, (endpoint_slice("web-1", "api"),))) == changed("ns/web", "ns/api")
    assert names(store.slices("ns/api")) == {"web-1"}


@pytest.mark.parametrize(
    ("kind", "name", "objects"),
    [(Service, ("ns", "web"), (service("api"),)), (EndpointSlice, ("ns", "web-1"), (endpoint_slice("api-1", "api"),))],
)
def test_unreadable_object_in_a_relist_keeps_its_last_state(
    store: Store, kind: Kind, name: tuple[str, str], objects: tuple[Object, ...]
) -> None:
    assert store.apply(Replace(kind, objects, (name,))) == NO_CHANGE
    assert store.service("ns/web") == service("web")
    assert names(store.slices("ns/web")) == {"web-1"}
    assert applied(store, Replace(kind, objects)) == changed("ns/web")


def test_unreadable_node_keeps_its_last_state(store: Store) -> None:
    assert store.apply(Replace(Node, (), (("", "node-1"),))) == NO_CHANGE
    assert store.node == Node("node-1")


def test_unreadable_object_that_was_never_known_is_not_a_change(store: Store) -> None:
    known = (service("web"), service("api"))
    assert store.apply(Replace(Service, known, (("ns", "bad"),))) == NO_CHANGE
    assert store.service("ns/bad") is None


@pytest.mark.parametrize("last", [Service, EndpointSlice, Node])
def test_store_is_complete_once_every_kind_was_listed(last: Kind) -> None:
    store = Store("node-1")
    store.apply(Upsert(service("web")))
    store.apply(Upsert(endpoint_slice("web-1")))
    store.apply(Upsert(Node("node-1")))
    for kind in BASIC_KINDS:
        if kind is not last:
            store.apply(Replace(kind, ()))
    assert not store.complete
    store.apply(Replace(last, ()))
    assert store.complete


def test_service_cidrs_must_be_listed_only_if_requested() -> None:
    store = Store("node-1", (*BASIC_KINDS, ServiceCIDR))
    for kind in BASIC_KINDS:
        store.apply(Replace(kind, ()))
    store.apply(Upsert(ServiceCIDR("kubernetes", ("10.96.0.0/16",))))
    assert not store.complete
    assert store.apply(Replace(ServiceCIDR, (ServiceCIDR("kubernetes", ("10.96.0.0/16",)),))) == NO_CHANGE
    assert store.complete


CIDRS_CHANGED = StoreChange(service_cidrs=True)


@pytest.fixture(name="cidr_store")
def store_with_service_cidrs() -> Store:
    return Store("node-1", (*BASIC_KINDS, ServiceCIDR))


def test_kinds_that_the_store_does_not_keep_are_ignored(store: Store) -> None:
    assert not store.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",))))
    assert not store.apply(Replace(ServiceCIDR, (ServiceCIDR("a", ("10.96.0.0/16",)),)))
    assert service_cidrs_of(store) == ()


def test_service_cidr_is_added_updated_and_deleted(cidr_store: Store) -> None:
    assert service_cidrs_of(cidr_store) == ()
    assert cidr_store.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",)))) == CIDRS_CHANGED
    assert cidr_store.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",)))) == NO_CHANGE
    assert cidr_store.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16", "fd00::/108")))) == CIDRS_CHANGED
    assert service_cidrs_of(cidr_store) == ("10.96.0.0/16", "fd00::/108")
    assert cidr_store.apply(Delete(ServiceCIDR, "", "a")) == CIDRS_CHANGED
    assert cidr_store.apply(Delete(ServiceCIDR, "", "a")) == NO_CHANGE
    assert service_cidrs_of(cidr_store) == ()


def test_relist_of_service_cidrs_changes_only_what_differs(cidr_store: Store) -> None:
    a, b = ServiceCIDR("a", ("10.96.0.0/16",)), ServiceCIDR("b", ("10.100.0.0/16",))
    assert cidr_store.apply(Replace(ServiceCIDR, (a, b))) == CIDRS_CHANGED
    assert cidr_store.apply(Replace(ServiceCIDR, (b, a))) == NO_CHANGE
    assert cidr_store.apply(Replace(ServiceCIDR, (a,), (("", "b"),))) == NO_CHANGE
    assert service_cidrs_of(cidr_store) == ("10.96.0.0/16", "10.100.0.0/16")
    assert cidr_store.apply(Replace(ServiceCIDR, (b,))) == CIDRS_CHANGED
    assert service_cidrs_of(cidr_store) == ("10.100.0.0/16",)
    assert cidr_store.apply(Replace(Service, ())) == NO_CHANGE
    assert service_cidrs_of(cidr_store) == ("10.100.0.0/16",)


def test_service_cidrs_are_sorted_and_unique_across_objects(cidr_store: Store) -> None:
    cidr_store.apply(Upsert(ServiceCIDR("a", ("fd00::/108", "10.100.0.0/16"))))
    cidr_store.apply(Upsert(ServiceCIDR("b", ("10.96.0.0/16",))))
    cidr_store.apply(Upsert(ServiceCIDR("c", ("10.100.0.0/16", "fd00::/112"))))
    assert service_cidrs_of(cidr_store) == ("10.96.0.0/16", "10.100.0.0/16", "fd00::/108", "fd00::/112")
    cidr_store.apply(Delete(ServiceCIDR, "", "a"))
    assert service_cidrs_of(cidr_store) == ("10.96.0.0/16", "10.100.0.0/16", "fd00::/112")


@settings(max_examples=60, deadline=None)
@given(st.lists(deltas(), max_size=20))
def test_services_outside_the_change_are_unchanged(history: list[Delta]) -> None:
    def snapshot() -> dict[str, tuple[Service | None, list[EndpointSlice]]]:
        keys = [f"ns/{name}" for name in "abc"]
        return {key: (store.service(key), sorted(store.slices(key), key=lambda item: item.name)) for key in keys}

    store = Store("node-1")
    for delta in history:
        before, node = snapshot(), store.node
        change = store.apply(delta)
        after = snapshot()
        assert {key for key in before if before[key] != after[key]} <= change.services
        assert change.node is (node != store.node)


def test_node_missing() -> None:
    store = Store("node-1")
    assert not store.node_missing, "not listed yet"
    assert not store.has_listed(Node)
    store.apply(Upsert(Node("node-2")))
    store.apply(Replace(Node, (Node("node-2"),)))
    assert store.has_listed(Node)
    assert store.node_missing
    store.apply(Invalid(Node, "", "node-2"))
    assert store.node_missing
    store.apply(Invalid(Node, "", "node-1"))
    assert not store.node_missing, "an invalid Node exists nevertheless"
    store.apply(Replace(Node, (Node("node-2"),)))
    store.apply(Upsert(Node("node-1", being_deleted=True)))
    assert not store.node_missing
    store.apply(Delete(Node, "", "node-2"))
    assert not store.node_missing
    assert store.apply(Delete(Node, "", "node-1")) == NO_CHANGE, "it was being deleted already"
    assert store.node_missing
    assert store.apply(Replace(Node, (Node("node-1", being_deleted=True),))) == NO_CHANGE
    assert not store.node_missing
    store.apply(Replace(Node, ()))
    assert store.node_missing
    store.apply(Replace(Node, (), (("", "node-1"),)))
    assert not store.node_missing, "an unreadable Node exists nevertheless"


@pytest.mark.parametrize(
    ("before", "after", "families"),
    [
        ((), ("10.96.0.9",), {Family.IPV4}),
        ((), ("fd00::9",), {Family.IPV6}),
        ((), ("10.96.0.9", "fd00::9"), {*Family}),
        (("10.96.0.9",), ("10.96.0.8",), {Family.IPV4}),
        (("10.96.0.9", "fd00::9"), ("10.96.0.9",), {*Family}),
        (("fd00::9",), (), {Family.IPV6}),
    ],
)
def test_changed_service_affects_the_families_that_it_has_or_had(
    store: Store, before: tuple[str, ...], after: tuple[str, ...], families: set[Family]
) -> None:
    if before:
        store.apply(Upsert(Service("ns", "new", before, ())))
    change = store.apply(Upsert(Service("ns", "new", after, ())) if after else Delete(Service, "ns", "new"))
    assert change.families == frozenset(families)
    assert [family for family in Family if change.affects(family)] == [each for each in Family if each in families]


def test_changed_slice_affects_the_families_that_it_has_or_had(store: Store) -> None:
    six = EndpointSlice("ns", "web-1", "ns/web", Family.IPV6)
    assert store.apply(Upsert(endpoint_slice("web-1", "web", "10.244.0.1"))).families == frozenset({Family.IPV4})
    assert store.apply(Upsert(six)).families == frozenset({*Family})
    assert store.apply(Delete(EndpointSlice, "ns", "web-1")).families == frozenset({Family.IPV6})


def test_lists_and_nodes_may_affect_every_family(store: Store) -> None:
    changes = [store.apply(Replace(EndpointSlice, ())), store.apply(Upsert(Node("node-1", zone="b")))]
    assert all(change.affects(family) for change in changes for family in Family)
