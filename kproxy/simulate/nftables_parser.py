"""The grammar of one rule as `nft list` prints it. Any word that is not known here is an `UnknownRuleError`.

A rule's statements are carried out from left to right. So one that changes a packet has done so even if a later one
finds that the rule does not match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_sets import ListedSet, Values, read_property
from kproxy.simulate.nftables_statements import (
    TABLES,
    ListedVerdict,
    PacketChange,
    PacketFields,
    PacketMatch,
    Statement,
    VerdictChoice,
    WordReader,
    always,
    read_destination,
    read_fields,
    read_plain,
    sees_field,
)
from kproxy.simulate.packet import Flock, PacketState, UnknownRuleError

_ROUNDING = 1e-12
"""What is left of 1 after all of its parts are taken away counts as nothing below this."""


class ListedRule(Struct, frozen=True):
    """A rule: what is asked and done first, and what is decided in the end, if anything."""

    steps: tuple[PacketMatch | PacketChange, ...]
    choice: VerdictChoice | None = None

    def hit(self, flock: Flock) -> tuple[list[tuple[ListedVerdict, Flock]], Flock]:
        """Return those about whom the rule decides, by decision, and those who go on with the next rule."""
        onward: Flock = []
        for step in self.steps:
            flock, missed = _take(step, flock)
            onward += missed
        if self.choice is None:
            return [], onward + flock
        decided: dict[ListedVerdict, Flock] = {}
        for passage, share in flock:
            rest = 1.0
            for decision, chance in self.choice.choose(passage):
                decided.setdefault(decision, []).append((passage, share * chance))
                rest -= chance
            if rest > _ROUNDING:
                onward.append((passage, share * rest))
        return list(decided.items()), onward


def _take(step: PacketMatch | PacketChange, flock: Flock) -> tuple[Flock, Flock]:
    """Return those who go on within the rule, and those whom it does not match."""
    if isinstance(step, PacketChange):
        return [(step.change(passage), share) for passage, share in flock], []
    chances = [(passage, share, step.share(passage)) for passage, share in flock]
    matching = [(passage, share * chance) for passage, share, chance in chances if chance]
    return matching, [(passage, share * (1.0 - chance)) for passage, share, chance in chances if chance < 1.0]


class ParserScope(Struct):
    """What the rules of a table share: its sets and maps, and which endpoints an affinity set leads to.

    `updated` and `endpoints` are those of the chain that is being read.
    """

    family: Family
    sets: dict[str, ListedSet]
    served: dict[str, set[str]] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    endpoints: set[str] = field(default_factory=set)

    def end_chain(self) -> None:
        """Keep in mind that whom the chain adds to a set, it sends to its endpoint."""
        for name in self.updated:
            self.served_by(name).update(self.endpoints)
        self.updated.clear()
        self.endpoints.clear()

    def served_by(self, name: str) -> set[str]:
        """Return the endpoints of the clients that a set remembers, which may still become more."""
        return self.served.setdefault(name, set())

    def named(self, words: WordReader) -> tuple[str, ListedSet]:
        """Take the name of a set or map; return it with what it holds."""
        name = words.next().removeprefix("@")
        if name not in self.sets:
            raise UnknownRuleError(f"there is no set or map {name}")
        return name, self.sets[name]

    def elements(self, words: WordReader, fields: PacketFields, values: Values) -> ListedSet:
        """Take a set or map, by name or as it stands in the rule, that leads from a key to such values."""
        if words.sees_set():
            _, found = self.named(words)
        else:
            found = ListedSet(self.family, fields.kinds, values)
            found.read_elements(words)
        found.check(fields, values)
        return found


def read_rule(words: WordReader, scope: ParserScope) -> ListedRule:
    """Return the rule of a line."""
    steps: list[PacketMatch | PacketChange] = []
    choice = None
    while words and not words.sees("comment") and not choice:
        statement = read_plain(words, scope.family) or _read_referring(words, scope)
        if isinstance(statement, VerdictChoice):
            choice = statement
        else:
            steps.append(statement)
    if words.take("comment"):
        words.text()
    words.end()
    return ListedRule(tuple(steps), choice)


def _read_referring(words: WordReader, scope: ParserScope) -> Statement:
    """Take a statement that needs a key, or what else is in the table."""
    if words.take("update"):
        return _read_update(words, scope)
    if words.take("dnat"):
        return _read_dnat(words, scope)
    fields = read_fields(words, scope.family)
    if words.take("vmap"):
        verdicts = scope.elements(words, fields, "verdict")
        return VerdictChoice(lambda passage: verdicts.choices(fields, passage), verdicts.chains)
    return _read_draw(words, fields) if fields.modulus else _read_comparison(words, scope, fields)


def _read_update(words: WordReader, scope: ParserScope) -> PacketChange:
    """Take the statement that remembers the source, for as long as the set says."""
    name, found = scope.named(words)
    words.expect("{")
    fields = read_fields(words, scope.family)
    words.expect("}")
    if not fields.is_source:
        raise UnknownRuleError("update is known for the packet's source only")
    found.check(fields, "nothing")
    scope.updated.add(name)
    return PacketChange(lambda passage: replace(passage, remembered=True))


def _read_dnat(words: WordReader, scope: ParserScope) -> VerdictChoice:
    words.take(TABLES[scope.family])
    words.expect("to")
    if not sees_field(words, scope.family):
        endpoint = read_destination(words, scope.family)
        scope.endpoints.add(endpoint.socket)
        return always(endpoint.decision())
    fields = read_fields(words, scope.family)
    words.expect("map")
    found = scope.elements(words, fields, "endpoint")
    return VerdictChoice(lambda passage: found.choices(fields, passage))


def _read_draw(words: WordReader, fields: PacketFields) -> PacketMatch:
    if len(fields.parts) > 1:
        raise UnknownRuleError("a key with a number is known in maps only")
    chance = 1.0 / fields.modulus if words.number() < fields.modulus else 0.0
    return PacketMatch(lambda _: chance)


def _read_comparison(words: WordReader, scope: ParserScope, fields: PacketFields) -> PacketMatch:
    negated = words.take("!=")
    if words.sees_set():
        return _read_lookup(words, scope, fields, negated=negated)
    if words.sees("{"):
        found = scope.elements(words, fields, "nothing")
    else:
        found = ListedSet(scope.family, fields.kinds, "nothing")
        found.read_element(words)
    return PacketMatch(lambda passage: found.holds(fields.key(passage)) is not negated)


def _read_lookup(words: WordReader, scope: ParserScope, fields: PacketFields, *, negated: bool) -> PacketMatch:
    """Take the name of a set. A source that was sent to an endpoint before is in the set that leads to it."""
    name, found = scope.named(words)
    found.check(fields, "nothing")
    served = scope.served_by(name)

    def holds(passage: PacketState) -> bool:
        remembered = fields.is_source and not passage.packet.remembered.isdisjoint(served)
        return remembered or found.holds(fields.key(passage))

    return PacketMatch(lambda passage: holds(passage) is not negated)


_T = TypeVar("_T")
_BLOCKS = ("set", "map", "chain")
_SHOWN = 200
"""How much of a line an error shows, in characters; some lines hold all elements of a map."""


class ListedChain(Struct):
    """A chain's rules, and for a base chain what makes it one."""

    rules: list[ListedRule] = field(default_factory=list)
    base: BaseChainHook | None = None


class ListedLine(Struct, frozen=True):
    """What belongs together: a line, or several if braces are open at the end. The number is that of the first."""

    number: int
    text: str

    def read(self, reader: Callable[[WordReader], _T]) -> _T:
        """Return what the reader makes of the line; its errors say where and in what."""
        try:
            return reader(WordReader(self.text))
        except UnknownRuleError as error:
            shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
            raise UnknownRuleError(f"line {self.number}: {error}: {shown}") from None


class ListedBlock(Struct):
    """A set, map or chain as it stands in the table."""

    kind: str
    name: str
    lines: list[ListedLine] = field(default_factory=list)


def read_dump(text: str, family: Family) -> dict[str, ListedChain]:
    """Return the chains of the table that `nft list table` printed, none for an empty text.

    Raises `UnknownRuleError` at whatever has no known meaning.
    """
    blocks = _read_blocks(text, family)
    sets = {block.name: _read_set(block, family) for block in blocks if block.kind != "chain"}
    scope = ParserScope(family, sets)
    chains = {block.name: _read_chain(block, scope) for block in blocks if block.kind == "chain"}
    if len(sets) + len(chains) < len(blocks):
        raise UnknownRuleError("two sets or two chains have one name")
    _check_targets(chains)
    _check_order(chains)
    return chains


def base_chains(chains: dict[str, ListedChain], hook: str) -> list[tuple[BaseChainHook, ListedChain]]:
    """Return the base chains of a hook in the order in which the kernel runs them."""
    found = [(chain.base, chain) for chain in chains.values() if chain.base and chain.base.hook == hook]
    return sorted(found, key=lambda each: each[0].order)


def _read_blocks(text: str, family: Family) -> list[ListedBlock]:
    lines = _lines(text)
    first = next(lines, None)
    if first is None:
        return []
    first.read(lambda words: _read_table(words, family))
    blocks: list[ListedBlock] = []
    for line in lines:
        if line.text == "}":
            break
        block = line.read(_read_head)
        if block:
            blocks.append(block)
            block.lines.extend(_until_brace(line, lines))
    else:
        raise UnknownRuleError("the table has no end")
    for line in lines:
        line.read(_refuse)
    return blocks


def _lines(text: str) -> Iterator[ListedLine]:
    """Yield the lines of a dump that hold anything. A `{` at the end opens a block, any other must be closed."""
    number, parts, depth = 0, list[str](), 0
    for place, line in enumerate(text.splitlines(), 1):
        part = line.strip()
        if not part:
            continue
        number = number if parts else place
        parts.append(part)
        depth += ListedLine(place, part).read(lambda words: words.open_braces)
        if depth <= 0 or (len(parts) == 1 and (part.endswith("{") or part == "}")):
            yield ListedLine(number, " ".join(parts))
            parts, depth = [], 0
    if parts:
        raise UnknownRuleError(f"line {number}: braces are open at the end: {parts[0]}")


def _until_brace(head: ListedLine, lines: Iterator[ListedLine]) -> Iterator[ListedLine]:
    for line in lines:
        if line.text == "}":
            return
        yield line
    raise UnknownRuleError(f"line {head.number}: a block without its end: {head.text}")


def _read_table(words: WordReader, family: Family) -> None:
    words.expect("table", TABLES[family])
    words.next()
    words.expect("{")
    words.end()


def _read_head(words: WordReader) -> ListedBlock | None:
    """Take what begins a block of the table; None for the table's comment."""
    kind = words.next()
    if kind == "comment":
        words.text()
        words.end()
        return None
    if kind not in _BLOCKS:
        raise UnknownRuleError(f"{kind} is not known here, only {', '.join(_BLOCKS)}")
    block = ListedBlock(kind, words.next())
    words.expect("{")
    words.end()
    return block


def _refuse(_: WordReader) -> None:
    raise UnknownRuleError("a second table is not known")


def _read_set(block: ListedBlock, family: Family) -> ListedSet:
    found: ListedSet | None = None
    for line in block.lines:
        found = line.read(partial(read_property, found=found, family=family, is_map=block.kind == "map"))
    if found is None:
        raise UnknownRuleError(f"{block.kind} {block.name} has no type")
    return found


def _read_chain(block: ListedBlock, scope: ParserScope) -> ListedChain:
    chain = ListedChain()
    for line in block.lines:
        line.read(lambda words: _read_chain_line(words, chain, scope))
    scope.end_chain()
    return chain


def _read_chain_line(words: WordReader, chain: ListedChain, scope: ParserScope) -> None:
    if words.take("type") and not chain.base:
        chain.base = read_base(words)
    elif words.sees("comment") and not chain.rules:
        words.next()
        words.text()
        words.end()
    else:
        chain.rules.append(read_rule(words, scope))


def _check_targets(chains: dict[str, ListedChain]) -> None:
    for name, chain in chains.items():
        for rule in chain.rules:
            missing = rule.choice.chains - chains.keys() if rule.choice else ()
            if missing:
                raise UnknownRuleError(f"chain {name}: there is no chain {', '.join(sorted(missing))}")


def _check_order(chains: dict[str, ListedChain]) -> None:
    """Refuse base chains of which a dump does not tell who is run first."""
    for hook in {chain.base.hook for chain in chains.values() if chain.base}:
        for (one, _), (other, _) in pairwise(base_chains(chains, hook)):
            if one.order == other.order or (one.type != other.type and one.order[0] == other.order[0]):
                raise UnknownRuleError(f"two base chains at hook {hook} have the same priority")


_HOOKS = {"filter": ("prerouting", "input", "forward", "output"), "nat": ("prerouting", "output", "postrouting")}


_NAT = {"prerouting": -100, "output": -100, "postrouting": 100}
"""Where the kernel runs all chains of type nat (enum nf_ip_hook_priorities)."""


_NAMES = {("dstnat", "prerouting"): -100, ("srcnat", "postrouting"): 100}


_FILTER_NAMES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}


_CONNTRACK = -200
"""Chains of this priority and before it see packets of which the connection is not known yet."""


class BaseChainHook(Struct, frozen=True):
    """What makes a chain a base chain: who runs it and when, and what becomes of a packet at its end."""

    type: Literal["filter", "nat"]
    hook: str
    priority: int
    drops: bool

    @property
    def order(self) -> tuple[int, int]:
        """The place among the base chains of the hook. Priorities of type nat only order such chains."""
        return (_NAT[self.hook] if self.type == "nat" else self.priority, self.priority)


def read_base(words: WordReader) -> BaseChainHook:
    """Take what follows `type`, such as `nat hook output priority -100; policy accept;`."""
    kind = words.next()
    words.expect("hook")
    hook = words.next()
    if hook not in _HOOKS.get(kind, ()):
        raise UnknownRuleError(f"type {kind} at hook {hook} is not known")
    words.expect("priority")
    priority = _read_priority(words, hook)
    if priority <= _CONNTRACK:
        raise UnknownRuleError(f"priority {priority}, before connections are known, is not known")
    words.expect(";", "policy")
    policy = words.next()
    if policy not in ("accept", "drop"):
        raise UnknownRuleError(f"policy {policy} is not known")
    words.expect(";")
    words.end()
    return BaseChainHook("nat" if kind == "nat" else "filter", hook, priority, policy == "drop")


def _read_priority(words: WordReader, hook: str) -> int:
    """Take a number, or a name that may have a number added or taken away."""
    if not words.sees_name():
        return words.number()
    name = words.next()
    known = _FILTER_NAMES.get(name, _NAMES.get((name, hook)))
    if known is None:
        raise UnknownRuleError(f"priority {name} at hook {hook} is not known")
    if words.take("+"):
        return known + words.number()
    return known - words.number() if words.take("-") else known
