"""What a table must contain according to the ledger, looked up part by part. Pure."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS, base_sets
from kproxy.nftables.comments import comment_of
from kproxy.nftables.elements import EndpointElements, SetElement, endpoint_elements, endpoint_key, endpoint_size
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import RenderedFrontend
from kproxy.nftables.ruleset import MapValue, NftChain, NftSet

BASE_SETS = {each.name: each for each in SETS}
"""The sets and maps whose elements kproxy programs. Rules add the elements of all other sets."""
_INDEX = struct.Struct("=I")


class DesiredTable:
    """The chains, sets and elements that a ledger describes.

    Elements are looked up in the ledger as it is now. The chains and sets of Services are indexed when they are first
    needed, so the object must not be kept for longer than the ledger stays the same.
    """

    def __init__(self, ledger: NftablesLedger, family: Family) -> None:
        self.family = family
        self._ledger = ledger
        self._endpoint_size = endpoint_size(family)
        self._base_sets = BASE_SETS
        if ledger.context is not None and ledger.context.connection_counters:
            self._base_sets = {each.name: each for each in base_sets(ledger.context)}
        self._service_chains: dict[str, NftChain] | None = None
        self._service_sets: dict[str, NftSet] | None = None

    def chain(self, name: str) -> NftChain | None:
        """Return a chain, or None if the table must not contain it."""
        if (shared := self._ledger.chains.get(name)) is not None:
            return shared
        return self._chains_of_services().get(name)

    def set(self, name: str) -> NftSet | None:
        """Return a set or map, or None if the table must not contain it."""
        return self._base_sets.get(name) or self._sets_of_services().get(name)

    def chain_names(self) -> Iterator[str]:
        """Yield the names of all chains."""
        yield from self._ledger.chains
        yield from self._chains_of_services()

    def set_names(self) -> Iterator[str]:
        """Yield the names of all sets."""
        yield from BASE_SETS
        yield from self._sets_of_services()

    def element(self, set_name: str, key: bytes) -> SetElement | None:
        """Return the element of a set in `BASE_SETS` with this key, or None if the set must not contain it."""
        definition = BASE_SETS[set_name]
        if definition.value is MapValue.NONE:
            return SetElement(key) if key in self._plain_keys(set_name) else None
        if definition.value is MapValue.VERDICT:
            frontend = self._ledger.owner(key)
            return _verdict_element(set_name, frontend) if frontend is not None else None
        frontend = self._ledger.owner(key[: -_INDEX.size])
        values = _endpoints(set_name, frontend)
        begin = self._index(key) * self._endpoint_size
        value = values[begin : begin + self._endpoint_size]
        return SetElement(key, value) if value else None

    def matcher(self, set_name: str) -> Callable[[SetElement], bool]:
        """Return a function that returns whether an element of a set in the kernel is as it must be."""
        if BASE_SETS[set_name].value is not MapValue.ENDPOINT:
            return lambda element: self.element(set_name, element.key) == element
        # A large cluster has a hundred thousand of these elements.
        owner, size, unpack = self._ledger.owner, self._endpoint_size, _INDEX.unpack

        def matches(element: SetElement) -> bool:
            key = element.key
            frontend = owner(key[: -_INDEX.size])
            for name, values in frontend.endpoints if frontend is not None else ():
                if name == set_name:
                    begin = unpack(key[-_INDEX.size :])[0] * size
                    return values[begin : begin + size] == element.value and not element.comment
            return False

        return matches

    def missing(self, set_name: str, groups: Iterable[bytes], found: Mapping[bytes, int]) -> Iterator[SetElement]:
        """Yield all elements of those groups for which the number of correct elements `found` is too small."""
        for group in groups:
            if found.get(group, 0) != self.group_size(set_name, group):
                yield from self.elements_of_group(set_name, group)

    def groups(self, set_name: str) -> list[bytes]:
        """Return the keys of the groups that `elements_of_group` accepts: together, they contain all elements of a set.

        A group contains the endpoints of one frontend in an endpoint map, and at most one element in any other set.
        """
        if BASE_SETS[set_name].value is MapValue.NONE:
            return list(self._plain_keys(set_name))
        return list(self._ledger.frontends)

    def group_size(self, set_name: str, group: bytes) -> int:
        """Return the number of elements in a group, without building them."""
        value = BASE_SETS[set_name].value
        if value is MapValue.NONE:
            return int(group in self._plain_keys(set_name))
        frontend = self._ledger.owner(group)
        if value is MapValue.VERDICT:
            return int(frontend is not None and any(name == set_name for name, _ in frontend.verdicts))
        return len(_endpoints(set_name, frontend)) // self._endpoint_size

    def elements_of_group(self, set_name: str, group: bytes) -> Iterator[SetElement]:
        """Yield the elements of a group."""
        if BASE_SETS[set_name].value is not MapValue.ENDPOINT:
            if (element := self.element(set_name, group)) is not None:
                yield element
            return
        values, size = _endpoints(set_name, self._ledger.owner(group)), self._endpoint_size
        for index, begin in enumerate(range(0, len(values), size)):
            yield SetElement(endpoint_key(group, index), values[begin : begin + size])

    def endpoint_runs(self, map_name: str, group: bytes) -> Iterator[EndpointElements]:
        """Yield all elements of a group in an endpoint map, in the form that is encoded fastest."""
        return endpoint_elements(group, _endpoints(map_name, self._ledger.owner(group)), self._endpoint_size)

    def elements(self, set_name: str) -> Iterator[SetElement]:
        """Yield all elements of a set in `BASE_SETS`."""
        return self.missing(set_name, self.groups(set_name), {})

    def _plain_keys(self, set_name: str) -> tuple[bytes, ...] | dict[bytes, int]:
        return (
            self._ledger.node_port_ips if set_name == names.NODE_PORT_IPS else self._ledger.element_references[set_name]
        )

    def _index(self, key: bytes) -> int:
        number: int = _INDEX.unpack(key[-_INDEX.size :])[0]
        return number

    def _chains_of_services(self) -> dict[str, NftChain]:
        if self._service_chains is None:
            self._service_chains = {chain.name: chain for chain in self._ledger.service_chains()}
        return self._service_chains

    def _sets_of_services(self) -> dict[str, NftSet]:
        if self._service_sets is None:
            self._service_sets = {each.name: each for each in self._ledger.service_sets()}
        return self._service_sets


def group_of(set_name: str, key: bytes) -> bytes:
    """Return the key of the group that an element of a set in `BASE_SETS` belongs to (see `DesiredTable.groups`)."""
    return key[: -_INDEX.size] if BASE_SETS[set_name].value is MapValue.ENDPOINT else key


def _verdict_element(map_name: str, frontend: RenderedFrontend) -> SetElement | None:
    for name, verdict in frontend.verdicts:
        if name == map_name:
            return SetElement(frontend.key, verdict, comment_of(frontend.service_port))
    return None


def _endpoints(map_name: str, frontend: RenderedFrontend | None) -> bytes:
    """Return the concatenated values of a frontend's endpoints in a map."""
    for name, values in frontend.endpoints if frontend is not None else ():
        if name == map_name:
            return values
    return b""
