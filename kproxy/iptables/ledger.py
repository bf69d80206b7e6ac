"""What the kernel holds of ours, as far as it accepted it: digests, not texts. Pure.

For 10,000 Services of 10 endpoints the rules are 50 MB of text; their names and digests are 6 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from kproxy.iptables.conflicts import ConflictResolution, FrontendClaims, settle
from kproxy.iptables.names import PORT_CHAIN_PREFIXES, ChainName, is_shard
from kproxy.iptables.patch import WORTHWHILE_RULES
from kproxy.iptables.render import DispatchRule, RenderedPort
from kproxy.iptables.save_restore import SavedChain, count_rules
from kproxy.model.types import Family, ServiceKey

Digest = int
"""Python's own 64-bit keyed hash of a text: compared within this process only."""


class PortRecord(Struct, frozen=True, gc=False):
    """The accepted state of one service port: its chains' names, a digest for each, and its dispatch rules.

    `rules` is how many rules the chains hold. `long` has, for each chain that may be patched, its place among the
    names, how many rules it has, and a digest of each.
    """

    names: str
    digests: bytes
    rules: int
    dispatch: tuple[DispatchRule, ...]
    long: bytes = b""

    @classmethod
    def of(cls, rendered: RenderedPort) -> PortRecord:
        """Return the record of a rendered port."""
        digests = array("q", map(hash, rendered.chains.values()))
        long = array("q")
        rules = 0
        for place, text in enumerate(rendered.chains.values()):
            count = count_rules([text])
            rules += count
            if count >= WORTHWHILE_RULES:
                long.extend((place, count, *map(hash, text.split("\n"))))
        return cls(" ".join(rendered.chains), digests.tobytes(), rules, rendered.dispatch, long.tobytes())

    def chains(self) -> Iterator[tuple[str, Digest]]:
        """Iterate over the chains of table nat with the digest of each."""
        return zip(self.names.split(), array("q", self.digests), strict=True)

    def rules_of(self, chain: str) -> Sequence[Digest]:
        """Return a digest of each rule of a chain of this port, none for a chain that is short or not there."""
        found, begin = array("q", self.long), 0
        names = self.names.split() if found else ()
        while begin < len(found):
            place, count = found[begin : begin + 2]
            if names[place] == chain:
                return found[begin + 2 : begin + 2 + count]
            begin += 2 + count
        return ()


ServiceRecord = dict[str, PortRecord]
"""The records of one Service's ports by `port name/protocol`."""


class IptablesSnapshot(Struct):
    """What a dump of the kernel showed: digests of the chains that are ours, rules of those we share."""

    ours: dict[ChainName, Digest]
    shared: dict[ChainName, list[str]]

    @classmethod
    def of(cls, saved: Mapping[ChainName, SavedChain]) -> IptablesSnapshot:
        """Sort the chains of a dump into ours and others."""
        ours: dict[ChainName, Digest] = {}
        shared: dict[ChainName, list[str]] = {}
        for chain, content in saved.items():
            if chain.name.startswith("KUBE-"):
                ours[chain] = hash("\n".join(content.rules))
            if not chain.name.startswith(PORT_CHAIN_PREFIXES):
                shared[chain] = content.rules
        return cls(ours, shared)

    def stale_chains(self, ports: Iterable[str], shards: Container[ChainName]) -> list[ChainName]:
        """Return the chains in the kernel that are of service ports or shards, but not among those in use.

        `ports` are names in table nat.
        """
        in_use = frozenset(ports)
        return [
            chain
            for chain in self.ours
            if chain.name.startswith(PORT_CHAIN_PREFIXES)
            and (chain.table == "nat" or is_shard(chain))
            and chain not in shards
            and not (chain.table == "nat" and chain.name in in_use)
        ]


class DispatchRecord(Struct, frozen=True):
    """The accepted state of a dispatch chain: digests of its tail, of itself, and of the shards it is split into.

    `own` is how many rules these chains hold that are of no Service: the tail, and the jumps to shards.
    """

    tail: Digest
    chains: dict[ChainName, Digest]
    own: int


class IptablesLedger:
    """The accepted state of one family: per Service, and the chains that all share."""

    def __init__(self) -> None:
        self.services: dict[ServiceKey, ServiceRecord] = {}
        self.base: dict[ChainName, Digest] = {}
        self.dispatch: dict[ChainName, DispatchRecord] = {}
        self.settlement = ConflictResolution()
        self._claims = FrontendClaims()
        self._base_rules: Counter[str] = Counter()
        self._service_rules: Counter[str] = Counter()

    @property
    def rules(self) -> dict[str, int]:
        """How many rules of ours each table holds, the jumps from built-in chains aside."""
        found = self._base_rules + self._service_rules
        for chain, record in self.dispatch.items():
            found[chain.table] += record.own
        found.subtract(rule.chain.table for rule in self.settlement.left_out)
        return {table: found[table] for table in ("nat", "filter")}

    def shared_chains(self) -> Iterator[tuple[ChainName, Digest]]:
        """Iterate over the chains that all Services share, less the shards, with the digest of each."""
        yield from self.base.items()
        for chain, record in self.dispatch.items():
            yield chain, record.chains[chain]

    def put(self, key: ServiceKey, record: ServiceRecord) -> None:
        """Replace the record of a Service; an empty one removes it."""
        old = self.services.pop(key, {})
        self._service_rules.subtract(_count(old))
        self._service_rules.update(_count(record))
        self._claims.put(key, _dispatch_rules(old), _dispatch_rules(record))
        if record:
            self.services[key] = record

    def settle(self, family: Family, changed: Mapping[ServiceKey, ServiceRecord]) -> ConflictResolution:
        """Return how claims to the same frontends are settled once `changed` has replaced this ledger's records."""
        contested = self._claims.contested({key: _dispatch_rules(record) for key, record in changed.items()})
        if not contested:
            return ConflictResolution()
        rules = {
            key: list(_owned_rules(key, changed[key] if key in changed else self.services[key]))
            for key in frozenset().union(*contested.values())
        }
        return settle(family, contested, rules)

    def put_base(self, base: dict[ChainName, Digest], rules: Counter[str]) -> None:
        """Replace what is known of the chains that are the same for all Services, `rules` being theirs by table."""
        self.base = base
        self._base_rules = rules

    def dispatch_rules(
        self, chains: Iterable[ChainName], changed: Mapping[ServiceKey, ServiceRecord]
    ) -> dict[ChainName, list[DispatchRule]]:
        """Return what all Services add to some dispatch chains, in the order of their names.

        `changed` holds the records that are about to replace this ledger's.
        """
        found: dict[ChainName, list[DispatchRule]] = {chain: [] for chain in chains}
        for key in sorted(self.services.keys() | changed.keys()) if found else ():
            ports = changed[key] if key in changed else self.services[key]
            for _, record in sorted(ports.items()) if len(ports) > 1 else ports.items():
                for rule in record.dispatch:
                    if rule.chain in found:
                        found[rule.chain].append(rule)
        return found


def _dispatch_rules(record: ServiceRecord) -> list[DispatchRule]:
    return [rule for port in record.values() for rule in port.dispatch]


def _owned_rules(key: ServiceKey, record: ServiceRecord) -> Iterator[tuple[str, DispatchRule]]:
    for name, port in record.items():
        port_name = name.partition("/")[0]
        owner = f"{key}:{port_name}" if port_name else key
        yield from ((owner, rule) for rule in port.dispatch)


def _count(record: ServiceRecord) -> Counter[str]:
    rules = Counter(rule.chain.table for port in record.values() for rule in port.dispatch)
    rules["nat"] += sum(port.rules for port in record.values())
    return rules


def dispatch_differs(old: ServiceRecord, new: ServiceRecord) -> set[ChainName]:
    """Return the dispatch chains in which a Service's rules differ between two states."""
    before, after = _dispatch_texts(old), _dispatch_texts(new)
    return {chain for chain in before.keys() | after.keys() if before.get(chain) != after.get(chain)}


def _dispatch_texts(record: ServiceRecord) -> dict[ChainName, list[str]]:
    found: dict[ChainName, list[str]] = {}
    for _, port in sorted(record.items()):
        for rule in port.dispatch:
            found.setdefault(rule.chain, []).append(rule.rule)
    return found
