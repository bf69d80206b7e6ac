"""The ledger: what the kernel has accepted so far, as digests instead of rules. Pure.

For 10,000 Services with 10 endpoints each, the rules are 50 MB of text. The names and digests of their chains take only
6 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from kproxy.iptables.frontend_conflicts import ConflictResolution, FrontendIndex, resolve_conflicts
from kproxy.iptables.names import PORT_CHAIN_PREFIXES, ChainName, is_shard
from kproxy.iptables.patch import MIN_PATCHABLE_RULES
from kproxy.iptables.render import DispatchRule, RenderedPort
from kproxy.iptables.save_restore import SavedChain, count_rules
from kproxy.model.types import Family, ServiceKey

Digest = int
"""Python's 64-bit hash of a string. The hash key is random, so digests from different processes cannot be compared."""


class PortRecord(Struct, frozen=True, gc=False):
    """The accepted state of one service port.

    `names` are the names of its per-Service chains, separated by spaces. `digests` are the digests of these chains in
    the same order, and `rule_count` is the number of rules in all of them. `patchable` describes the chains that are
    long enough to be patched. For each of them, it contains the chain's index in `names`, its number of rules, and the
    digest of each rule. All numbers in `digests` and `patchable` are 64-bit integers in the host's byte order.
    """

    names: str
    digests: bytes
    rule_count: int
    dispatch: tuple[DispatchRule, ...]
    patchable: bytes = b""

    @classmethod
    def from_rendered(cls, rendered: RenderedPort) -> PortRecord:
        """Return the record of a rendered port."""
        digests = array("q", map(hash, rendered.chains.values()))
        patchable = array("q")
        rule_count = 0
        for index, text in enumerate(rendered.chains.values()):
            count = count_rules([text])
            rule_count += count
            if count >= MIN_PATCHABLE_RULES:
                patchable.extend((index, count, *map(hash, text.split("\n"))))
        return cls(" ".join(rendered.chains), digests.tobytes(), rule_count, rendered.dispatch, patchable.tobytes())

    @classmethod
    def of_digests(cls, chains: Mapping[str, Digest]) -> PortRecord:
        """Return a record of per-Service chains of which only the names and digests are known."""
        return cls(" ".join(chains), array("q", chains.values()).tobytes(), 0, ())

    def chains(self) -> Iterator[tuple[str, Digest]]:
        """Iterate over the names and digests of the per-Service chains, which are in table nat."""
        return zip(self.names.split(), array("q", self.digests), strict=True)

    def rule_digests_of(self, chain: str) -> Sequence[Digest]:
        """Return the digests of the rules of a per-Service chain.

        There are none if the chain is too short to be patched or does not exist.
        """
        patchable, begin = array("q", self.patchable), 0
        names = self.names.split() if patchable else ()
        while begin < len(patchable):
            index, count = patchable[begin : begin + 2]
            if names[index] == chain:
                return patchable[begin + 2 : begin + 2 + count]
            begin += 2 + count
        return ()


ServiceRecord = dict[str, PortRecord]
"""The records of one Service's ports, keyed by `port name/protocol`."""


class IptablesSnapshot(Struct):
    """The chains in the kernel as `iptables-save` printed them.

    `digests` contains the digest of every KUBE- chain. `rules` contains the rules of every chain that is neither a
    per-Service chain nor a shard.
    """

    digests: dict[ChainName, Digest]
    rules: dict[ChainName, list[str]]

    @classmethod
    def from_saved(cls, saved: Mapping[ChainName, SavedChain]) -> IptablesSnapshot:
        """Return the snapshot of the chains in `iptables-save` output."""
        digests: dict[ChainName, Digest] = {}
        rules: dict[ChainName, list[str]] = {}
        for chain, content in saved.items():
            if chain.name.startswith("KUBE-"):
                digests[chain] = hash("\n".join(content.rules))
            if not chain.name.startswith(PORT_CHAIN_PREFIXES):
                rules[chain] = content.rules
        return cls(digests, rules)

    def stale_chains(self, port_chains: Iterable[str], shards: Container[ChainName]) -> list[ChainName]:
        """Return the existing per-Service chains and shards that are no longer used.

        `port_chains` are the names of the per-Service chains in use, which are in table nat. `shards` are the shards in
        use.
        """
        in_use = frozenset(port_chains)
        return [
            chain
            for chain in self.digests
            if chain.name.startswith(PORT_CHAIN_PREFIXES)
            and (chain.table == "nat" or is_shard(chain))
            and chain not in shards
            and not (chain.table == "nat" and chain.name in in_use)
        ]


class DispatchRecord(Struct, frozen=True):
    """The accepted state of a dispatch chain: the digests of its trailing rules, of the chain itself and of its shards.

    `non_service_rules` is the number of rules in these chains that do not belong to a Service: the jumps to shards and
    the trailing rules.
    """

    trailing_rules: Digest
    chains: dict[ChainName, Digest]
    non_service_rules: int


class IptablesLedger:
    """The accepted state of one IP family: the records of all Services and of the shared chains.

    `deviations` contains the chains whose content in the kernel differs from these records, because a sync was
    accepted only in part: their digests, or None for a chain that does not exist. `deviating` are the Services to which
    such chains belong.
    """

    def __init__(self) -> None:
        self.deviations: dict[ChainName, Digest | None] = {}
        self.deviating: set[ServiceKey] = set()
        self.services: dict[ServiceKey, ServiceRecord] = {}
        self.base: dict[ChainName, Digest] = {}
        self.dispatch: dict[ChainName, DispatchRecord] = {}
        self.resolution = ConflictResolution()
        self._frontends = FrontendIndex()
        self._base_rules: Counter[str] = Counter()
        self._service_rules: Counter[str] = Counter()

    @property
    def rule_counts(self) -> dict[str, int]:
        """Number of accepted rules in each table, not counting the jumps from built-in chains."""
        counts = self._base_rules + self._service_rules
        for chain, record in self.dispatch.items():
            counts[chain.table] += record.non_service_rules
        counts.subtract(rule.chain.table for rule in self.resolution.omitted_rules)
        return {table: counts[table] for table in ("nat", "filter")}

    def shared_chains(self) -> Iterator[tuple[ChainName, Digest]]:
        """Iterate over the names and digests of the shared chains, without the shards."""
        yield from self.base.items()
        for chain, record in self.dispatch.items():
            yield chain, record.chains[chain]

    def put(self, key: ServiceKey, record: ServiceRecord) -> None:
        """Replace the record of a Service, or remove it if the new record is empty."""
        old = self.services.pop(key, {})
        self._service_rules.subtract(_count(old))
        self._service_rules.update(_count(record))
        self._frontends.update(key, _dispatch_rules(old), _dispatch_rules(record))
        if record:
            self.services[key] = record

    def existing(self, chain: ChainName, recorded: Digest | None) -> Digest | None:
        """Return the digest of a chain in the kernel, or None if it does not exist.

        `recorded` is the digest in the chain's record, or None if it has no record.
        """
        return self.deviations.get(chain, recorded) if self.deviations else recorded

    def put_base(self, base: dict[ChainName, Digest], rules: Counter[str]) -> None:
        """Replace the digests of the chains that do not depend on Services.

        `rules` is the number of rules in these chains by table.
        """
        self.base = base
        self._base_rules = rules

    def resolve_conflicts(self, family: Family, changed: Mapping[ServiceKey, ServiceRecord]) -> ConflictResolution:
        """Resolve the conflicts over frontends that would exist if `changed` were already in the ledger.

        The records in `changed` take precedence over those in the ledger. The ledger itself is not changed.
        """
        shared = self._frontends.shared_frontends({key: _dispatch_rules(record) for key, record in changed.items()})
        if not shared:
            return ConflictResolution()
        rules = {
            key: list(_rules_by_service_port(key, changed[key] if key in changed else self.services[key]))
            for key in frozenset().union(*shared.values())
        }
        return resolve_conflicts(family, shared, rules)

    def dispatch_rules(
        self, chains: Iterable[ChainName], changed: Mapping[ServiceKey, ServiceRecord]
    ) -> dict[ChainName, list[DispatchRule]]:
        """Return the rules of all Services in the given dispatch chains, sorted by Service and port.

        For the Services in `changed`, these are the rules of the given records instead of those in the ledger.
        """
        found: dict[ChainName, list[DispatchRule]] = {chain: [] for chain in chains}
        for key in sorted(self.services.keys() | changed.keys()) if found else ():
            ports = changed[key] if key in changed else self.services[key]
            for _, record in sorted(ports.items()) if len(ports) > 1 else ports.items():
                for rule in record.dispatch:
                    if rule.chain in found:
                        found[rule.chain].append(rule)
        return found


def changed_dispatch_chains(old: ServiceRecord, new: ServiceRecord) -> set[ChainName]:
    """Return the dispatch chains in which two records of a Service have different rules."""
    old_rules, new_rules = _dispatch_rules_by_chain(old), _dispatch_rules_by_chain(new)
    return {chain for chain in old_rules.keys() | new_rules.keys() if old_rules.get(chain) != new_rules.get(chain)}


def record_chains(record: ServiceRecord) -> list[tuple[str, Digest]]:
    """Return the names and digests of the per-Service chains of a Service, which are in table nat."""
    return [chain for port in record.values() for chain in port.chains()]


def _dispatch_rules(record: ServiceRecord) -> list[DispatchRule]:
    return [rule for port in record.values() for rule in port.dispatch]


def _dispatch_rules_by_chain(record: ServiceRecord) -> dict[ChainName, list[str]]:
    rules: dict[ChainName, list[str]] = {}
    for _, port in sorted(record.items()):
        for rule in port.dispatch:
            rules.setdefault(rule.chain, []).append(rule.rule)
    return rules


def _rules_by_service_port(key: ServiceKey, record: ServiceRecord) -> Iterator[tuple[str, DispatchRule]]:
    for name, port in record.items():
        port_name = name.partition("/")[0]
        service_port = f"{key}:{port_name}" if port_name else key
        yield from ((service_port, rule) for rule in port.dispatch)


def _count(record: ServiceRecord) -> Counter[str]:
    rules = Counter(rule.chain.table for port in record.values() for rule in port.dispatch)
    rules["nat"] += sum(port.rule_count for port in record.values())
    return rules
