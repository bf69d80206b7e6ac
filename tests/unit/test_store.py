"""What each delta changes in the desired state."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.model.delta import BASIC_KINDS, Delete, Delta, Invalid, Kind, Object, Replace, Upsert
from kproxy.model.store import Store, StoreChange
from kproxy.model.types import Endpoint, EndpointSlice, Family, Node, Service, ServiceCIDR
from tests.unit.strategies import deltas

NOTHING = StoreChange()


def changed(*services: str, node: bool = False, appeared: str = "") -> StoreChange:
    return StoreChange(frozenset(services), node, appeared=frozenset(appeared.split()))


def service(name: str, address: str = "10.96.0.1") -> Service:
    return Service("ns", name, (address,), ())


def a_slice(name: str, owner: str = "web", *addresses: str) -> EndpointSlice:
    return EndpointSlice("ns", name, f"ns/{owner}", Family.IPV4, tuple(map(Endpoint, addresses)))


def ranges(store: Store) -> tuple[str, ...]:
    return store.service_cidrs


def names(slices: Iterable[EndpointSlice]) -> set[str]:
    return {each.name for each in slices}


@pytest.fixture(name="store")
def two_services() -> Store:
    """Two Services with a slice each, and their Node."""
    found = Store("node-1")
    found.apply(Replace(Service, (service("web"), service("api"))))
    found.apply(Replace(EndpointSlice, (a_slice("web-1", "web"), a_slice("api-1", "api"))))
    found.apply(Replace(Node, (Node("node-1"),)))
    return found


def test_a_change_is_true_if_anything_changed() -> None:
    assert not NOTHING
    assert changed("ns/web")
    assert changed(node=True)
    assert StoreChange(service_cidrs=True)


def test_a_new_or_changed_service_dirties_itself(store: Store) -> None:
    assert store.apply(Upsert(service("new"))) == changed("ns/new", appeared="ns/new")
    assert store.apply(Upsert(service("web", "10.96.0.2"))) == changed("ns/web")
    assert store.service("ns/web") == service("web", "10.96.0.2")


def test_what_is_known_already_changes_nothing(store: Store) -> None:
    for known in (service("web"), a_slice("web-1"), Node("node-1")):
        assert store.apply(Upsert(known)) == NOTHING


def test_a_deleted_service_dirties_itself_once(store: Store) -> None:
    assert store.apply(Delete(Service, "ns", "web")) == changed("ns/web")
    assert store.apply(Delete(Service, "ns", "web")) == NOTHING
    assert store.service("ns/web") is None
    assert list(store.service_keys()) == ["ns/api"]


def test_a_slice_dirties_its_service(store: Store) -> None:
    assert store.apply(Upsert(a_slice("web-2"))) == changed("ns/web")
    assert store.apply(Upsert(a_slice("web-2", "web", "10.0.0.1"))) == changed("ns/web")
    assert names(store.slices("ns/web")) == {"web-1", "web-2"}
    assert store.apply(Delete(EndpointSlice, "ns", "web-2")) == changed("ns/web")
    assert store.apply(Delete(EndpointSlice, "ns", "web-2")) == NOTHING
    assert names(store.slices("ns/web")) == {"web-1"}


def test_a_slice_may_come_before_its_service(store: Store) -> None:
    assert store.apply(Upsert(a_slice("new-1", "new"))) == changed("ns/new")
    assert store.service("ns/new") is None
    assert names(store.slices("ns/new")) == {"new-1"}


def test_a_slice_that_moves_dirties_both_services(store: Store) -> None:
    assert store.apply(Upsert(a_slice("web-1", "api"))) == changed("ns/web", "ns/api")
    assert names(store.slices("ns/web")) == set()
    assert names(store.slices("ns/api")) == {"web-1", "api-1"}
    assert store.apply(Delete(EndpointSlice, "ns", "web-1")) == changed("ns/api")


def test_slices_of_the_same_name_in_other_namespaces_are_others(store: Store) -> None:
    other = EndpointSlice("other", "web-1", "other/web", Family.IPV4)
    assert store.apply(Upsert(other)) == changed("other/web")
    assert store.apply(Delete(EndpointSlice, "other", "web-1")) == changed("other/web")
    assert names(store.slices("ns/web")) == {"web-1"}


def test_only_the_own_node_counts(store: Store) -> None:
    assert store.apply(Upsert(Node("node-2", zone="zone-b"))) == NOTHING
    assert store.apply(Delete(Node, "", "node-2")) == NOTHING
    assert store.apply(Replace(Node, (Node("node-2"), Node("node-1", zone="zone-a")))) == changed(node=True)
    assert store.node == Node("node-1", zone="zone-a")
    assert store.apply(Delete(Node, "", "node-1")) == changed(node=True)
    assert store.apply(Delete(Node, "", "node-1")) == NOTHING
    assert store.node == Node("node-1", zone="zone-a", being_deleted=True)
    assert store.apply(Upsert(Node("node-1", zone="zone-b"))) == changed(node=True)
    assert store.node == Node("node-1", zone="zone-b")


def test_refused_services_are_counted_until_they_can_be_used_or_are_gone(store: Store) -> None:
    assert store.invalid_services == 0
    assert store.apply(Invalid(Service, "ns", "web")) == NOTHING
    assert store.apply(Invalid(Service, "ns", "broken")) == NOTHING
    store.apply(Invalid(EndpointSlice, "ns", "web-1"))
    assert store.invalid_services == 2
    assert store.service("ns/web") == service("web")
    assert store.apply(Upsert(service("web"))) == NOTHING
    assert store.invalid_services == 1
    store.apply(Delete(Service, "ns", "broken"))
    assert store.invalid_services == 0
    store.apply(Replace(Service, (service("web"),), (("ns", "api"), ("ns", "other"))))
    assert store.invalid_services == 2
    store.apply(Replace(Service, (service("web"),), ignored=3))
    assert (store.invalid_services, store.ignored_services) == (0, 3)


def test_a_relist_is_a_difference(store: Store) -> None:
    assert store.apply(Replace(Service, (service("web"), service("api")))) == NOTHING
    assert store.apply(Replace(Service, (service("web"), service("new")))) == changed(
        "ns/api", "ns/new", appeared="ns/new"
    )
    assert store.apply(Replace(EndpointSlice, (a_slice("web-1", "web", "10.0.0.1"),))) == changed("ns/web", "ns/api")
    assert store.apply(Replace(Service, ())) == changed("ns/web", "ns/new")
    assert names(store.slices("ns/web")) == {"web-1"}
    assert store.apply(Replace(Node, ())) == changed(node=True)


def test_a_slice_may_move_in_a_relist(store: Store) -> None:
    assert store.apply(Replace(EndpointSlice, (a_slice("web-1", "api"),))) == changed("ns/web", "ns/api")
    assert names(store.slices("ns/api")) == {"web-1"}


@pytest.mark.parametrize(
    ("kind", "name", "objects"),
    [(Service, ("ns", "web"), (service("api"),)), (EndpointSlice, ("ns", "web-1"), (a_slice("api-1", "api"),))],
)
def test_what_a_relist_cannot_read_stays(
    store: Store, kind: Kind, name: tuple[str, str], objects: tuple[Object, ...]
) -> None:
    assert store.apply(Replace(kind, objects, (name,))) == NOTHING
    assert store.service("ns/web") == service("web")
    assert names(store.slices("ns/web")) == {"web-1"}
    assert store.apply(Replace(kind, objects)) == changed("ns/web")


def test_an_unreadable_node_stays(store: Store) -> None:
    assert store.apply(Replace(Node, (), (("", "node-1"),))) == NOTHING
    assert store.node == Node("node-1")


def test_an_unreadable_object_that_was_never_known_is_nothing(store: Store) -> None:
    known = (service("web"), service("api"))
    assert store.apply(Replace(Service, known, (("ns", "bad"),))) == NOTHING
    assert store.service("ns/bad") is None


@pytest.mark.parametrize("last", [Service, EndpointSlice, Node])
def test_the_state_is_complete_once_every_kind_was_listed(last: Kind) -> None:
    store = Store("node-1")
    store.apply(Upsert(service("web")))
    store.apply(Upsert(a_slice("web-1")))
    store.apply(Upsert(Node("node-1")))
    for kind in BASIC_KINDS:
        if kind is not last:
            store.apply(Replace(kind, ()))
    assert not store.complete
    store.apply(Replace(last, ()))
    assert store.complete


def test_service_cidrs_have_to_be_listed_only_where_asked_for() -> None:
    store = Store("node-1", (*BASIC_KINDS, ServiceCIDR))
    for kind in BASIC_KINDS:
        store.apply(Replace(kind, ()))
    store.apply(Upsert(ServiceCIDR("kubernetes", ("10.96.0.0/16",))))
    assert not store.complete
    assert store.apply(Replace(ServiceCIDR, (ServiceCIDR("kubernetes", ("10.96.0.0/16",)),))) == NOTHING
    assert store.complete


RANGES = StoreChange(service_cidrs=True)


@pytest.fixture(name="wide")
def store_that_keeps_service_cidrs() -> Store:
    return Store("node-1", (*BASIC_KINDS, ServiceCIDR))


def test_what_a_store_does_not_keep_changes_nothing(store: Store) -> None:
    assert not store.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",))))
    assert not store.apply(Replace(ServiceCIDR, (ServiceCIDR("a", ("10.96.0.0/16",)),)))
    assert ranges(store) == ()


def test_service_cidrs_come_change_and_go(wide: Store) -> None:
    assert ranges(wide) == ()
    assert wide.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",)))) == RANGES
    assert wide.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16",)))) == NOTHING
    assert wide.apply(Upsert(ServiceCIDR("a", ("10.96.0.0/16", "fd00::/108")))) == RANGES
    assert ranges(wide) == ("10.96.0.0/16", "fd00::/108")
    assert wide.apply(Delete(ServiceCIDR, "", "a")) == RANGES
    assert wide.apply(Delete(ServiceCIDR, "", "a")) == NOTHING
    assert ranges(wide) == ()


def test_a_relist_of_service_cidrs_is_a_difference(wide: Store) -> None:
    a, b = ServiceCIDR("a", ("10.96.0.0/16",)), ServiceCIDR("b", ("10.100.0.0/16",))
    assert wide.apply(Replace(ServiceCIDR, (a, b))) == RANGES
    assert wide.apply(Replace(ServiceCIDR, (b, a))) == NOTHING
    assert wide.apply(Replace(ServiceCIDR, (a,), (("", "b"),))) == NOTHING
    assert ranges(wide) == ("10.96.0.0/16", "10.100.0.0/16")
    assert wide.apply(Replace(ServiceCIDR, (b,))) == RANGES
    assert ranges(wide) == ("10.100.0.0/16",)
    assert wide.apply(Replace(Service, ())) == NOTHING
    assert ranges(wide) == ("10.100.0.0/16",)


def test_service_cidrs_are_in_order_each_once_whichever_object_has_them(wide: Store) -> None:
    wide.apply(Upsert(ServiceCIDR("a", ("fd00::/108", "10.100.0.0/16"))))
    wide.apply(Upsert(ServiceCIDR("b", ("10.96.0.0/16",))))
    wide.apply(Upsert(ServiceCIDR("c", ("10.100.0.0/16", "fd00::/112"))))
    assert ranges(wide) == ("10.96.0.0/16", "10.100.0.0/16", "fd00::/108", "fd00::/112")
    wide.apply(Delete(ServiceCIDR, "", "a"))
    assert ranges(wide) == ("10.96.0.0/16", "10.100.0.0/16", "fd00::/112")


@settings(max_examples=60, deadline=None)
@given(st.lists(deltas(), max_size=20))
def test_a_service_that_is_not_dirty_is_as_it_was(history: list[Delta]) -> None:
    def shown() -> dict[str, tuple[Service | None, list[EndpointSlice]]]:
        keys = [f"ns/{name}" for name in "abc"]
        return {key: (store.service(key), sorted(store.slices(key), key=lambda each: each.name)) for key in keys}

    store = Store("node-1")
    for delta in history:
        before, node = shown(), store.node
        found = store.apply(delta)
        after = shown()
        assert {key for key in before if before[key] != after[key]} <= found.services
        assert found.node is (node != store.node)


def test_whether_this_node_exists() -> None:
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
    assert not store.node_missing, "it is there, whatever is wrong with it"
    store.apply(Replace(Node, (Node("node-2"),)))
    store.apply(Upsert(Node("node-1", being_deleted=True)))
    assert not store.node_missing
    store.apply(Delete(Node, "", "node-2"))
    assert not store.node_missing
    assert store.apply(Delete(Node, "", "node-1")) == NOTHING, "it was about to go before"
    assert store.node_missing
    assert store.apply(Replace(Node, (Node("node-1", being_deleted=True),))) == NOTHING
    assert not store.node_missing
    store.apply(Replace(Node, ()))
    assert store.node_missing
    store.apply(Replace(Node, (), (("", "node-1"),)))
    assert not store.node_missing, "it exists, but cannot be read"
