"""A simulated API server: objects that change at random, and watches that are delayed, break and start again."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from kproxy.model.delta import Delete, Delta, Invalid, Kind, Object, Replace, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServiceCIDR, ServicePort

NODE = "node-1"
NAMESPACE = "ns"
NODE_PORTS = (0, 0, 30080, 30081)
PORT_SETS = (
    (("", 80, "TCP"),),
    (("", 80, "TCP"),),
    (("http", 80, "TCP"), ("dns", 53, "UDP")),
    (("", 80, "UDP"),),
)
SLICE_PORTS = (
    EndpointPort("", 8080, "TCP"),
    EndpointPort("http", 8081, "TCP"),
    EndpointPort("dns", 8053, "UDP"),
    EndpointPort("", 8080, "UDP"),
)
ADDRESSES = {Family.IPV4: "10.244.0.", Family.IPV6: "fd00:1::"}
NODE_ADDRESSES = ("10.99.0.2", "fd00:99::2")
EXTERNAL_IPS = (
    (),
    (),
    (),
    ("192.0.2.1", "2001:db8::1"),
    ("10.96.0.1", "fd00::1"),  # the ClusterIPs of Service `a`
    ("203.0.113.1", "2001:db8::2"),  # also a load balancer address of others
)
SOURCE_RANGES = ((), (), ("198.51.100.0/24", "2001:db8:100::/64"), ("198.51.100.0/24",), ("10.99.0.0/24",))
READY = (True, True, True, False)
Name = tuple[str, str]
"""Namespace and name of an object."""
Objects = dict[Name, Object | None]
"""The objects of one kind. None stands for an object that cannot be used."""


class KindState:
    """One kind of object, and kproxy's watch of it.

    `states[n]` are the objects after the first n changes, and `changes[n]` is the change that follows. A change of None
    ends every watch, because the server was restored from a backup. The watch has delivered `cursor` changes.
    """

    def __init__(self) -> None:
        self.states: list[Objects] = [{}]
        self.changes: list[Delta | None] = []
        self.cursor = 0
        self.broken = True

    @property
    def objects(self) -> Objects:
        return self.states[-1]

    @property
    def behind(self) -> bool:
        """Whether the watch has something to deliver."""
        return self.broken or self.cursor < len(self.changes)

    def change(self, name: Name, obj: Object | None, delta: Delta | None) -> None:
        """Change one object."""
        objects = {**self.objects, name: obj}
        if isinstance(delta, Delete):
            del objects[name]
        self.states.append(objects)
        self.changes.append(delta)

    def restore(self, index: int) -> None:
        """Return to an older state."""
        self.states.append(self.states[index])
        self.changes.append(None)


class Cluster:
    """The API server and all objects."""

    def __init__(self, random: Random, names: str, families: tuple[Family, ...]) -> None:
        self.random = random
        self.names = names
        self.families = families
        self.kinds: dict[Kind, KindState] = {kind: KindState() for kind in (Service, EndpointSlice, Node, ServiceCIDR)}
        for name in names:
            self.put(self.new_service(name))
            for family in families:
                self.put(self.new_slice(name, family, 0))
        self.put(self.new_node())
        self.put(ServiceCIDR("kubernetes", ("10.96.0.0/16", "fd00::/112")))

    # Objects

    def new_service(self, name: str) -> Service:
        random = self.random
        number = "abcde".index(name) + 1
        every = {Family.IPV4: f"10.96.0.{number}", Family.IPV6: f"fd00::{number}"}
        ips = tuple(every[family] for family in self.families)
        if len(ips) > 1 and random.random() < 0.2:
            ips = (random.choice(ips),)
        ports = tuple(ServicePort(*port, random.choice(NODE_PORTS)) for port in random.choice(PORT_SETS))  # type: ignore[arg-type]
        balanced = random.random() < 0.3
        return Service(
            NAMESPACE,
            name,
            ips,
            ports,
            affinity_seconds=10800 if random.random() < 0.2 else 0,
            internal_local=random.random() < 0.15,
            external_local=random.random() < 0.3,
            external_ips=random.choice(EXTERNAL_IPS),
            vips=random.choice((("203.0.113.1", "2001:db8::2"), (f"203.0.113.1{number}",))) if balanced else (),
            source_ranges=random.choice(SOURCE_RANGES) if balanced else (),
            health_check_node_port=32000 + number if balanced and random.random() < 0.3 else 0,
        )

    def new_slice(self, service: str, family: Family, index: int) -> EndpointSlice:
        random = self.random
        endpoints = tuple(self._endpoint(family) for _ in range(random.choice((0, 1, 1, 2, 2, 3, 4))))
        name = f"{service}-{family.value.lower()}-{index}"
        return EndpointSlice(NAMESPACE, name, f"{NAMESPACE}/{service}", family, endpoints, SLICE_PORTS)

    def _endpoint(self, family: Family) -> Endpoint:
        random = self.random
        ready = random.choice(READY)
        terminating = not ready and random.random() < 0.5
        return Endpoint(
            f"{ADDRESSES[family]}{random.randint(1, 9)}",
            random.choice((NODE, "node-2", "node-2", "")),
            ready,
            ready or terminating,
            terminating,
            random.choice(((), (), (), ("zone-a",), ("zone-b",))),
        )

    def new_node(self) -> Node:
        random = self.random
        addresses = random.choice((NODE_ADDRESSES, NODE_ADDRESSES, NODE_ADDRESSES[:1]))
        return Node(NODE, addresses=addresses, zone=random.choice(("", "zone-a", "zone-b")))

    # Changes

    def put(self, obj: Object) -> None:
        """Create or change an object."""
        self.kinds[type(obj)].change(_name(obj), obj, Upsert(obj))

    def delete(self, kind: Kind, name: Name) -> None:
        """Delete an object."""
        self.kinds[kind].change(name, None, Delete(kind, *name))

    def change_something(self) -> str:
        """Make a random change, and return it as text."""
        random = self.random
        draw = random.random()
        if draw < 0.3:
            obj: Object = self.new_service(random.choice(self.names))
        elif draw < 0.75:
            obj = self.new_slice(random.choice(self.names), random.choice(self.families), random.choice((0, 0, 1)))
        elif draw < 0.85:
            return self._delete_something()
        elif draw < 0.93:
            obj = self.new_node()
        elif draw < 0.96:
            obj = ServiceCIDR("more", (random.choice(("10.97.0.0/16", "10.98.0.0/16")),))
        else:
            return self._spoil_something()
        self.put(obj)
        return f"put {obj}"

    def _delete_something(self) -> str:
        kind = self.random.choice((Service, EndpointSlice, EndpointSlice))
        if not (names := sorted(self.kinds[kind].objects)):
            return "delete nothing"
        name = self.random.choice(names)
        self.delete(kind, name)
        return f"delete {kind.__name__} {name[1]}"

    def _spoil_something(self) -> str:
        kind: Kind = self.random.choice((Service, EndpointSlice, Node))
        if not (names := sorted(self.kinds[kind].objects)):
            return "spoil nothing"
        name = self.random.choice(names)
        self.kinds[kind].change(name, None, Invalid(kind, *name))
        return f"spoil {kind.__name__} {name[1]}"

    def restore_backup(self) -> str:
        """Restore an older state of all objects."""
        for state in self.kinds.values():
            state.restore(self.random.randrange(len(state.states)))
        return "restore a backup"

    def repair_objects(self) -> None:
        """Replace all objects that cannot be used, and make sure that the Node exists."""
        for kind, state in self.kinds.items():
            for name in [name for name, obj in state.objects.items() if obj is None]:
                self.put(self._valid(kind, name[1]))
        if not self.kinds[Node].objects:
            self.put(self.new_node())

    def _valid(self, kind: Kind, name: str) -> Object:
        if kind is Service:
            return self.new_service(name)
        if kind is EndpointSlice:
            service, family, index = name.split("-")
            return self.new_slice(service, next(each for each in Family if each.value.lower() == family), int(index))
        return self.new_node()

    # Watches

    def restart_watches(self) -> None:
        """List everything again, for a new process."""
        for state in self.kinds.values():
            state.broken = True

    def deliver(self, kind: Kind, *, current: bool = False) -> tuple[Delta, ...]:
        """Return the next deltas of a kind's watch. With `current`, a list is never stale."""
        state = self.kinds[kind]
        if not state.broken and state.cursor < len(state.changes):
            limit = state.cursor + (len(state.changes) if current else self.random.randint(1, 3))
            found = tuple(self._until_broken(state, limit))
            if found or not state.broken:
                return found
        if not state.broken:
            return ()
        # A list from a cache of the API server can be older than what a watch has delivered before.
        stale = 0 if current else self.random.choice((0, 0, 1, 2))
        state.cursor = max(0, len(state.changes) - stale)
        state.broken = False
        objects = state.states[state.cursor]
        unreadable = tuple(name for name, obj in objects.items() if obj is None)
        return (Replace(kind, tuple(obj for obj in objects.values() if obj is not None), unreadable),)

    def _until_broken(self, state: KindState, limit: int) -> Iterator[Delta]:
        for delta in state.changes[state.cursor : limit]:
            if delta is None:
                state.broken = True
                return
            state.cursor += 1
            yield delta

    def lists(self) -> Iterator[Replace]:
        """Yield a list of all objects of each kind."""
        for kind, state in self.kinds.items():
            yield Replace(kind, tuple(obj for obj in state.objects.values() if obj is not None))


def _name(obj: Object) -> Name:
    return ("", obj.name) if isinstance(obj, Node | ServiceCIDR) else (obj.namespace, obj.name)
