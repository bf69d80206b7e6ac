"""What the kernel holds of ours, as far as it accepted it: digests, not texts. Pure.

For 10,000 Services of 10 endpoints the rules are 50 MB of text; their names and digests are 4 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from kproxy.iptables.names import DISPATCH, PORT_CHAIN_PREFIXES, Chain
from kproxy.iptables.render import RenderedPort
from kproxy.iptables.text import SavedChain, count_rules
from kproxy.model.types import ServiceKey

Digest = int
"""Python's own 64-bit keyed hash of a text: compared within this process only."""


class PortRecord(Struct, frozen=True, gc=False):
    """The accepted state of one service port: its chains' names, a digest for each, and its dispatch rules.

    `rules` is how many rules the chains hold.
    """

    names: str
    digests: bytes
    rules: int
    dispatch: tuple[tuple[Chain, str], ...]

    @classmethod
    def of(cls, rendered: RenderedPort) -> PortRecord:
        """Return the record of a rendered port."""
        digests = array("q", map(hash, rendered.chains.values()))
        rules = count_rules(rendered.chains.values())
        return cls(" ".join(rendered.chains), digests.tobytes(), rules, rendered.dispatch)

    def chains(self) -> Iterator[tuple[str, Digest]]:
        """Iterate over the chains of table nat with the digest of each."""
        return zip(self.names.split(), array("q", self.digests), strict=True)


ServiceRecord = dict[str, PortRecord]
"""The records of one Service's ports by `port name/protocol`."""


class KernelView(Struct):
    """What a dump of the kernel showed: digests of the chains that are ours, rules of those we share."""

    ours: dict[Chain, Digest]
    shared: dict[Chain, list[str]]

    @classmethod
    def of(cls, saved: Mapping[Chain, SavedChain]) -> KernelView:
        """Sort the chains of a dump into ours and others."""
        ours: dict[Chain, Digest] = {}
        shared: dict[Chain, list[str]] = {}
        for chain, content in saved.items():
            if chain.name.startswith("KUBE-"):
                ours[chain] = hash("\n".join(content.rules))
            if not chain.name.startswith(PORT_CHAIN_PREFIXES):
                shared[chain] = content.rules
        return cls(ours, shared)

    def stale_port_chains(self, used: Iterable[str]) -> list[Chain]:
        """Return the chains of service ports that are in the kernel and in no record."""
        in_use = frozenset(used)
        return [
            chain
            for chain in self.ours
            if chain.table == "nat" and chain.name.startswith(PORT_CHAIN_PREFIXES) and chain.name not in in_use
        ]


class Ledger:
    """The accepted state of one family: per Service, and the chains that all share."""

    def __init__(self) -> None:
        self.services: dict[ServiceKey, ServiceRecord] = {}
        self.base: dict[Chain, Digest] = {}
        self._base_rules: Counter[str] = Counter()
        self._service_rules: Counter[str] = Counter()

    @property
    def rules(self) -> dict[str, int]:
        """How many rules of ours each table holds, the jumps from built-in chains aside."""
        return {table: self._base_rules[table] + self._service_rules[table] for table in ("nat", "filter")}

    def put(self, key: ServiceKey, record: ServiceRecord) -> None:
        """Replace the record of a Service; an empty one removes it."""
        self._service_rules.subtract(_count(self.services.pop(key, {})))
        self._service_rules.update(_count(record))
        if record:
            self.services[key] = record

    def put_base(self, base: dict[Chain, Digest], rules: Counter[str]) -> None:
        """Replace what is known of the chains that all Services share, `rules` being their numbers by table."""
        self.base = base
        self._base_rules = rules

    def dispatch_text(self, chain: Chain, tail: Iterable[str], changed: Mapping[ServiceKey, ServiceRecord]) -> str:
        """Return a dispatch chain's rules: those of all Services in the order of their names, then the tail.

        `changed` holds the records that are about to replace this ledger's.
        """
        keys = sorted(self.services.keys() | changed.keys())
        rules = [
            rule
            for key in keys
            for _, record in sorted((changed[key] if key in changed else self.services[key]).items())
            for owner, rule in record.dispatch
            if owner == chain
        ]
        return "\n".join([*rules, *tail])


def _count(record: ServiceRecord) -> Counter[str]:
    rules = Counter(chain.table for port in record.values() for chain, _ in port.dispatch)
    rules["nat"] += sum(port.rules for port in record.values())
    return rules


def dispatch_differs(old: ServiceRecord, new: ServiceRecord) -> set[Chain]:
    """Return the dispatch chains in which a Service's rules differ between two states."""
    before = {name: record.dispatch for name, record in old.items()}
    after = {name: record.dispatch for name, record in new.items()}
    if before == after:
        return set()
    return {chain for chain in DISPATCH if _rules_in(chain, before) != _rules_in(chain, after)}


def _rules_in(chain: Chain, ports: Mapping[str, tuple[tuple[Chain, str], ...]]) -> list[str]:
    return [rule for _, dispatch in sorted(ports.items()) for owner, rule in dispatch if owner == chain]
