"""Find the Services because of which the kernel rejected a transaction. Pure."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS
from kproxy.nftables.ledger import claim_order
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import MapValue

UNIVERSAL_CODES = frozenset({errno.EPERM, errno.EACCES, errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.EAGAIN})
"""Errors that do not depend on the contents of a transaction: any other transaction would be rejected, too."""
DRIFT_CODES = frozenset({errno.ENOENT, errno.EEXIST, errno.EBUSY})
"""Errors that usually mean that another process changed the table: objects are missing, already exist or are in use."""
_INDEX_SIZE = 4
_VALUES = {each.name: each.value for each in SETS}


class RejectedObject(Struct, frozen=True):
    """An object because of which the kernel rejected a transaction.

    `name` is the name of the table, chain or set; a rejected rule counts as its chain. For an element, `name` is the
    name of its set, and `key` is the element's key. `code` is the errno, or 0 if it is unknown. `reason` is one line
    that names the object and contains the kernel's message.
    """

    kind: Literal["table", "chain", "set", "element"]
    name: str
    reason: str
    key: bytes = b""
    code: int = 0


class ServiceChange(Struct, frozen=True, gc=False):
    """The state of a Service before and after a transaction. None means that the Service does not exist."""

    old: RenderedService | None
    new: RenderedService | None


def find_culprits(
    rejected: Iterable[RejectedObject], changes: Mapping[ServiceKey, ServiceChange]
) -> dict[ServiceKey, RejectedObject]:
    """Map each Service because of which the kernel rejected a transaction to its first rejected object.

    `rejected` are the rejected objects in the order of the transaction, and `changes` are the Services that the
    transaction changes. Objects that do not belong to one of these Services are ignored.
    """
    index = _Index(changes)
    culprits: dict[ServiceKey, RejectedObject] = {}
    for each in rejected:
        for key in index.services(each):
            culprits.setdefault(key, each)
    return culprits


class _Index:
    """The Services that need each object of a transaction. It is built when it is first used."""

    def __init__(self, changes: Mapping[ServiceKey, ServiceChange]) -> None:
        self._changes = changes
        self._objects: dict[tuple[str, str | bytes], list[ServiceKey]] | None = None

    def services(self, rejected: RejectedObject) -> Sequence[ServiceKey]:
        """Return the Services that are the reason for a rejection, or nothing if no Service is."""
        if rejected.kind == "table":
            return ()
        if self._objects is None:
            self._objects = {}
            for service, change in self._changes.items():
                for each in dict.fromkeys((*_objects(change.old), *_objects(change.new))):
                    self._objects.setdefault(each, []).append(service)
        if rejected.kind != "element":
            return self._objects.get((rejected.kind, rejected.name), ())
        value = _VALUES.get(rejected.name)
        if value is MapValue.NONE:
            return self._objects.get((rejected.name, rejected.key), ())
        frontend = rejected.key[:-_INDEX_SIZE] if value is MapValue.ENDPOINT else rejected.key
        found = self._objects.get(("frontend", frontend), ())
        return found if len(found) < 2 else self._owners(found, frontend)

    def _owners(self, services: Sequence[ServiceKey], frontend: bytes) -> Sequence[ServiceKey]:
        """Return the Service that owns a contested frontend after the transaction, or all Services if there is none."""
        claims: dict[ServiceKey, RenderedFrontend] = {}
        for service in services:
            new = self._changes[service].new
            mine = [each for each in new.frontends if each.key == frontend] if new else []
            if mine:
                claims[service] = min(mine, key=claim_order)
        return [min(claims, key=lambda service: claim_order(claims[service]))] if claims else services


def _objects(service: RenderedService | None) -> Iterator[tuple[str, str | bytes]]:
    if service is None:
        return
    yield names.CLUSTER_IPS, service.cluster_ip
    yield from ((names.HAIRPINS, key) for key in service.hairpins)
    yield from (("frontend", frontend.key) for frontend in service.frontends)
    yield from (("chain", chain.name) for chain in service.chains)
    yield from (("set", each.name) for each in service.sets)
