"""Services that keep what an existing table has for them, because the kernel rejects their new rules. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from kproxy.model.addresses import socket_text
from kproxy.model.types import Family, ServiceKey
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS
from kproxy.nftables.comments import comment_of
from kproxy.nftables.elements import DROP, endpoint_key, hairpin_key, hairpin_keys
from kproxy.nftables.isolation import MIN_FAILURES, Changes, NoCulpritError, Rejection
from kproxy.nftables.rejection import RejectedObject, find_culprits
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import Dnat, MapValue, MatchL4Proto
from kproxy.nftables.service_chains import ReadRules, ServiceChainReader, ServiceChains
from kproxy.nftables.shared_chains import SharedChain
from kproxy.nftables.snapshot import TableSnapshot

_VERDICT_MAPS = tuple(each.name for each in SETS if each.value is MapValue.VERDICT)
_ENDPOINT_MAPS = tuple(each.name for each in SETS if each.value is MapValue.ENDPOINT)


class HeldServices:
    """Decides which Services a full sync does not change.

    Such a Service gets what the kernel has accepted last, or keeps what an existing table has for it.

    `culprits` maps each Service because of which the kernel rejected the sync to the reason. If the culprits are
    unknown, all Services are held, so that only the rest of the table is programmed, and the caller must program the
    Services afterwards. At first, this excludes Services with chains of their own whose rules are unknown, because
    reading them takes long.
    """

    def __init__(self, accepted: Mapping[ServiceKey, RenderedService], family: Family, read_rules: ReadRules) -> None:
        """Hold no Service yet.

        `accepted` contains Services as the kernel accepted them last, as far as it is known. `read_rules` is used for
        chains of other Services.
        """
        self.culprits: dict[ServiceKey, str] = {}
        self._accepted = accepted
        self._family = family
        self._read_rules = read_rules
        self._reduced: set[ServiceKey] = set()
        self._removed: set[ServiceKey] = set()
        self._hold_plain = self._hold_all = False

    @property
    def holds_all(self) -> bool:
        """Whether Services are held that are not known to be culprits."""
        return self._hold_plain or self._hold_all

    def state(
        self, key: ServiceKey, new: RenderedService | None, snapshot: TableSnapshot | None
    ) -> RenderedService | None:
        """Return the state to program for a Service: `new`, or what the kernel has accepted for it.

        The snapshot must still be complete as far as this Service is concerned. Raises the errors of `read_rules`.
        """
        is_known = new is None or not new.chains or key in self._accepted
        if key not in self.culprits and not self._hold_all and not (self._hold_plain and is_known):
            return new
        if new is None or key in self._removed:
            return None
        if key in self._reduced and snapshot is not None:
            return _with_own_frontends(self._accepted[key], snapshot)
        if key in self._accepted:
            return self._accepted[key]
        if snapshot is None:
            return None
        return held_service(new, snapshot, ServiceChainReader(self._family, snapshot, self._read_rules))

    def add(self, rejection: Rejection, changes: Changes) -> None:
        """Hold more Services after the kernel rejected `changes`, the complete table.

        Raises `NoCulpritError` if the reason of the rejection is not a Service.
        """
        found = find_culprits(rejection.objects, changes)
        if found.keys() - self._removed and (len(found) < len(changes) or len(found) < MIN_FAILURES):
            self._add_culprits(found)
        elif rejection.objects or self._hold_all:
            raise NoCulpritError(rejection)
        else:
            self._hold_plain, self._hold_all = True, self._hold_plain

    def _add_culprits(self, found: Mapping[ServiceKey, RejectedObject]) -> None:
        for key, rejected in found.items():
            if key in self.culprits and key in self._accepted and key not in self._reduced:
                self._reduced.add(key)
            elif key in self.culprits:
                self._removed.add(key)
            self.culprits.setdefault(key, rejected.reason)


def _with_own_frontends(accepted: RenderedService, snapshot: TableSnapshot) -> RenderedService:
    """Return a Service without the frontends for which the table has no verdict of this Service.

    They may belong to another Service, which has priority. If that one is deleted, the kernel would have to accept new
    elements of this Service.
    """

    def has_verdict(frontend: RenderedFrontend) -> bool:
        elements = (snapshot.elements.get(name, {}).get(frontend.key) for name in _VERDICT_MAPS)
        comment = comment_of(frontend.service_port)
        return any(element is not None and element.comment == comment for element in elements)

    return replace(accepted, frontends=tuple(each for each in accepted.frontends if has_verdict(each)))


def held_service(new: RenderedService, snapshot: TableSnapshot, reader: ServiceChainReader) -> RenderedService | None:
    """Return what a table has for the frontends of a Service, or None if it has nothing that can stay.

    A frontend can stay if its verdicts are those of this Service, and refer only to shared chains and to chains of this
    Service with rules that kproxy can have written. The snapshot must still be complete.
    """
    if new.cluster_ip not in snapshot.elements.get(names.CLUSTER_IPS, {}):
        return None
    own = ServiceChains()
    frontends = tuple(
        held for frontend in new.frontends if (held := _held_frontend(frontend, snapshot, reader, own)) is not None
    )
    if not frontends:
        return None
    present = snapshot.elements.get(names.HAIRPINS, {})
    hairpins = dict.fromkeys((*new.hairpins, *_hairpins(frontends, own, reader.family)))
    return RenderedService(
        new.cluster_ip,
        frontends,
        tuple(key for key in hairpins if key in present),
        tuple(own.chains.values()),
        tuple(own.sets.values()),
    )


def _held_frontend(
    new: RenderedFrontend, snapshot: TableSnapshot, reader: ServiceChainReader, own: ServiceChains
) -> RenderedFrontend | None:
    verdicts: list[tuple[str, str]] = []
    needed = ServiceChains()
    for map_name in _VERDICT_MAPS:
        element = snapshot.elements.get(map_name, {}).get(new.key)
        if element is None:
            continue
        verdict = element.value
        if element.comment != comment_of(new.service_port) or not isinstance(verdict, str):
            return None
        if not _is_shared(verdict):
            chains = reader.read(verdict, new.service_port)
            if chains is None:
                return None
            needed.add(chains)
        verdicts.append((map_name, verdict))
    if not verdicts:
        return None
    own.add(needed)
    endpoints = ((name, _endpoints(new.key, name, snapshot)) for name in _ENDPOINT_MAPS)
    return RenderedFrontend(
        new.key, tuple(verdicts), tuple(each for each in endpoints if each[1]), new.service, new.port_name, new.rank
    )


def _is_shared(verdict: str) -> bool:
    return verdict in {DROP, names.REJECT} or SharedChain.parse(verdict) is not None


def _endpoints(key: bytes, map_name: str, snapshot: TableSnapshot) -> bytes:
    elements = snapshot.elements.get(map_name, {})
    values: list[bytes] = []
    while (element := elements.get(endpoint_key(key, len(values)))) is not None:
        assert isinstance(element.value, bytes)
        values.append(element.value)
    return b"".join(values)


def _hairpins(frontends: Iterable[RenderedFrontend], own: ServiceChains, family: Family) -> Iterator[bytes]:
    """Yield the keys of connections from each endpoint to itself."""
    for rule in own.rules():
        protocols = [each.protocol for each in rule.statements if isinstance(each, MatchL4Proto)]
        for each in rule.statements:
            if isinstance(each, Dnat) and protocols:
                yield hairpin_key(socket_text(each.address, each.port), protocols[0])
    for frontend in frontends:
        for _, values in frontend.endpoints:
            yield from hairpin_keys(frontend.key, values, family)
