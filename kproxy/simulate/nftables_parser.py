"""Parse the output of `nft list table` into chains and rules that can be simulated.

Unsupported tokens raise `UnknownRuleError`. The kernel runs the statements of a rule from left to right. Therefore, a
statement that changes the packet takes effect even if a later statement of the same rule does not match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_sets import ListedSet, SetKind, parse_set_property
from kproxy.simulate.nftables_statements import (
    NFT_FAMILIES,
    KeyExpression,
    ListedVerdict,
    PacketChange,
    PacketMatch,
    Statement,
    TokenReader,
    VerdictChoice,
    at_key,
    parse_dnat_target,
    parse_key,
    parse_simple_statement,
    unconditional,
)
from kproxy.simulate.packet import Branches, PacketState, UnknownRuleError

_BLOCKS = ("counter", "set", "map", "chain")
_SHOWN_CHARACTERS = 200
"""Maximum number of characters of a line in an error message. Some lines contain all elements of a map."""
_ROUNDING = 1e-12
"""A probability up to this value is a rounding error and counts as 0."""
_HOOKS = {"filter": ("prerouting", "input", "forward", "output"), "nat": ("prerouting", "output", "postrouting")}
_NAT_PRIORITIES = {"prerouting": -100, "output": -100, "postrouting": 100}
"""For each hook, the priority at which the kernel runs all nat chains (enum nf_ip_hook_priorities)."""
_PRIORITY_NAMES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_NAT_PRIORITY_NAMES = {("dstnat", "prerouting"): -100, ("srcnat", "postrouting"): 100}
_CONNTRACK_PRIORITY = -200
"""A chain with this priority or a lower one runs before connection tracking (NF_IP_PRI_CONNTRACK)."""

_T = TypeVar("_T")


class BaseChainHook(Struct, frozen=True):
    """The properties of a base chain: its type, hook and priority, and whether its policy is drop."""

    type: Literal["filter", "nat"]
    hook: str
    priority: int
    drops: bool

    @property
    def order(self) -> tuple[int, int]:
        """The key by which the base chains of a hook are sorted.

        The kernel runs all nat chains of a hook together, at a fixed priority. The priority that a nat chain declares
        only determines its position among the nat chains.
        """
        return (_NAT_PRIORITIES[self.hook] if self.type == "nat" else self.priority, self.priority)


class ListedRule(Struct, frozen=True):
    """A rule: statements that match or change the packet, and the verdict statement at its end, if it has one."""

    statements: tuple[PacketMatch | PacketChange, ...]
    choice: VerdictChoice | None = None

    def evaluate(self, branches: Branches) -> tuple[list[tuple[ListedVerdict, Branches]], Branches]:
        """Run the rule. Return two lists: each verdict with the branches that get it, and the remaining branches.

        The remaining branches continue with the next rule.
        """
        continued: Branches = []
        for statement in self.statements:
            branches, missed = _run_statement(statement, branches)
            continued += missed
        if self.choice is None:
            return [], continued + branches
        decided: dict[ListedVerdict, Branches] = {}
        for state, probability in branches:
            rest = 1.0
            for verdict, share in self.choice.choose(state):
                decided.setdefault(verdict, []).append((state, probability * share))
                rest -= share
            if rest > _ROUNDING:
                continued.append((state, probability * rest))
        return list(decided.items()), continued


def _run_statement(statement: PacketMatch | PacketChange, branches: Branches) -> tuple[Branches, Branches]:
    """Run one statement of a rule.

    Return two lists: the branches that continue with the next statement, and the branches that do not match.
    """
    if isinstance(statement, PacketChange):
        return [(statement.change(state), probability) for state, probability in branches], []
    shares = [(state, probability, statement.probability(state)) for state, probability in branches]
    matched = [(state, probability * share) for state, probability, share in shares if share]
    return matched, [(state, probability * (1.0 - share)) for state, probability, share in shares if share < 1.0]


class ListedChain(Struct):
    """The rules of a chain. `base` is None unless the chain is a base chain."""

    rules: list[ListedRule] = field(default_factory=list)
    base: BaseChainHook | None = None


def base_chains(chains: dict[str, ListedChain], hook: str) -> list[tuple[BaseChainHook, ListedChain]]:
    """Return the base chains of a hook in the order in which the kernel runs them."""
    found = [(chain.base, chain) for chain in chains.values() if chain.base and chain.base.hook == hook]
    return sorted(found, key=lambda pair: pair[0].order)


def parse_table(text: str, family: Family) -> dict[str, ListedChain]:
    """Parse the output of `nft list table`. Return the chains by name; an empty text has no chains.

    Raises `UnknownRuleError` for anything that is not supported.
    """
    blocks = [block for block in _parse_blocks(text, family) if block.kind != "counter"]
    sets = {block.name: _parse_set(block, family) for block in blocks if block.kind != "chain"}
    scope = _TableScope(family, sets)
    chains = {block.name: _parse_chain(block, scope) for block in blocks if block.kind == "chain"}
    if len(sets) + len(chains) < len(blocks):
        raise UnknownRuleError("duplicate name of a set, map or chain")
    _check_chain_references(chains)
    _check_order(chains)
    return chains


def _check_chain_references(chains: dict[str, ListedChain]) -> None:
    for name, chain in chains.items():
        for rule in chain.rules:
            missing = rule.choice.chains - chains.keys() if rule.choice else ()
            if missing:
                raise UnknownRuleError(f"chain {name}: chain {', '.join(sorted(missing))} does not exist")


def _check_order(chains: dict[str, ListedChain]) -> None:
    """Raise `UnknownRuleError` if two base chains of a hook run at the same priority.

    The dump does not show which of the two chains the kernel runs first.
    """
    for hook in {chain.base.hook for chain in chains.values() if chain.base}:
        for (one, _), (other, _) in pairwise(base_chains(chains, hook)):
            if one.order == other.order or (one.type != other.type and one.order[0] == other.order[0]):
                raise UnknownRuleError(f"ambiguous order: two base chains at hook {hook} have the same priority")


# Lines and blocks.


class _Line(Struct, frozen=True):
    """A line of a dump, joined with its continuation lines. `number` is the 1-based number of the first line."""

    number: int
    text: str

    def parse(self, parser: Callable[[TokenReader], _T]) -> _T:
        """Parse this line with `parser` and return the result. Adds the line's number and text to errors."""
        try:
            return parser(TokenReader(self.text))
        except UnknownRuleError as error:
            long = len(self.text) > _SHOWN_CHARACTERS
            shown = self.text[:_SHOWN_CHARACTERS] + "..." if long else self.text
            raise UnknownRuleError(f"line {self.number}: {error}: {shown}") from None


class _Block(Struct):
    """A set, map or chain of a table."""

    kind: str
    name: str
    lines: list[_Line] = field(default_factory=list)


def _parse_blocks(text: str, family: Family) -> list[_Block]:
    lines = _split_lines(text)
    first = next(lines, None)
    if first is None:
        return []
    first.parse(lambda tokens: _parse_table_header(tokens, family))
    blocks: list[_Block] = []
    for line in lines:
        if line.text == "}":
            break
        block = line.parse(_parse_block_header)
        if block:
            blocks.append(block)
            block.lines.extend(_block_lines(line, lines))
    else:
        raise UnknownRuleError("unterminated table")
    for line in lines:
        line.parse(_reject_second_table)
    return blocks


def _split_lines(text: str) -> Iterator[_Line]:
    """Yield the non-empty lines of a dump, each joined with its continuation lines.

    A line with an unclosed brace continues on the next lines, up to the matching closing brace. The exception is a line
    that ends with `{`: it is the first line of a block and has no continuation lines.
    """
    number, parts, depth = 0, list[str](), 0
    for current, line in enumerate(text.splitlines(), 1):
        part = line.strip()
        if not part:
            continue
        number = number if parts else current
        parts.append(part)
        depth += _Line(current, part).parse(lambda tokens: tokens.open_braces)
        if depth <= 0 or (len(parts) == 1 and (part.endswith("{") or part == "}")):
            yield _Line(number, " ".join(parts))
            parts, depth = [], 0
    if parts:
        raise UnknownRuleError(f"line {number}: unbalanced braces: {parts[0]}")


def _block_lines(header: _Line, lines: Iterator[_Line]) -> Iterator[_Line]:
    for line in lines:
        if line.text == "}":
            return
        yield line
    raise UnknownRuleError(f"line {header.number}: unterminated block: {header.text}")


def _parse_table_header(tokens: TokenReader, family: Family) -> None:
    tokens.expect("table", NFT_FAMILIES[family])
    tokens.next()
    tokens.expect("{")
    tokens.expect_end()


def _parse_block_header(tokens: TokenReader) -> _Block | None:
    """Parse the first line of a set, map or chain. Return None if the line is the comment of the table."""
    kind = tokens.next()
    if kind == "comment":
        tokens.quoted()
        tokens.expect_end()
        return None
    if kind not in _BLOCKS:
        raise UnknownRuleError(f"unexpected {kind}, expected one of {', '.join(_BLOCKS)}")
    block = _Block(kind, tokens.next())
    tokens.expect("{")
    tokens.expect_end()
    return block


def _reject_second_table(_: TokenReader) -> None:
    raise UnknownRuleError("unexpected second table")


# Sets, chains and base chains.


class _TableScope(Struct):
    """The sets and maps of a table, and the endpoints of its affinity sets.

    An affinity set is a set to which a rule adds the source address of a packet. The set records the clients that
    have session affinity to an endpoint. The endpoints ("ip:port") are the DNAT targets of the chain with that rule.
    `affinity` maps the name of each affinity set to these endpoints.

    `updated` and `endpoints` belong to the chain that is being parsed: `updated` are the names of the affinity sets to
    which its rules add the source, and `endpoints` are the endpoints to which its rules translate destinations.
    """

    family: Family
    sets: dict[str, ListedSet]
    affinity: dict[str, set[str]] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    endpoints: set[str] = field(default_factory=set)

    def end_chain(self) -> None:
        """Finish the current chain: record its endpoints for the affinity sets that it updates."""
        for name in self.updated:
            self.affinity_endpoints(name).update(self.endpoints)
        self.updated.clear()
        self.endpoints.clear()

    def affinity_endpoints(self, name: str) -> set[str]:
        """Return the endpoints of an affinity set.

        The parser adds endpoints to the returned set until the last chain has been parsed.
        """
        return self.affinity.setdefault(name, set())

    def parse_named_set(self, tokens: TokenReader) -> tuple[str, ListedSet]:
        """Parse a reference to a named set or map. Return its name, and the set or map."""
        name = tokens.next().removeprefix("@")
        if name not in self.sets:
            raise UnknownRuleError(f"set or map {name} does not exist")
        return name, self.sets[name]

    def parse_set(self, tokens: TokenReader, key: KeyExpression, kind: SetKind) -> ListedSet:
        """Parse a reference to a named set or map, or the elements of an anonymous one.

        Raises `UnknownRuleError` if it is not of the expected kind, or if its key type differs from the type of `key`.
        """
        if tokens.at_set_reference():
            _, found = self.parse_named_set(tokens)
        else:
            found = ListedSet(self.family, key.types, kind)
            found.parse_elements(tokens)
        found.check(key, kind)
        return found


def _parse_set(block: _Block, family: Family) -> ListedSet:
    found: ListedSet | None = None
    for line in block.lines:
        found = line.parse(partial(parse_set_property, found=found, family=family, is_map=block.kind == "map"))
    if found is None:
        raise UnknownRuleError(f"{block.kind} {block.name} has no type")
    return found


def _parse_chain(block: _Block, scope: _TableScope) -> ListedChain:
    chain = ListedChain()
    for line in block.lines:
        line.parse(lambda tokens: _parse_chain_line(tokens, chain, scope))
    scope.end_chain()
    return chain


def _parse_chain_line(tokens: TokenReader, chain: ListedChain, scope: _TableScope) -> None:
    if tokens.accept("type") and not chain.base:
        chain.base = _parse_base_chain(tokens)
    elif tokens.at("comment") and not chain.rules:
        tokens.next()
        tokens.quoted()
        tokens.expect_end()
    else:
        chain.rules.append(_parse_rule(tokens, scope))


def _parse_base_chain(tokens: TokenReader) -> BaseChainHook:
    """Parse the part of the line that follows `type`, such as `nat hook output priority -100; policy accept;`."""
    kind = tokens.next()
    tokens.expect("hook")
    hook = tokens.next()
    if hook not in _HOOKS.get(kind, ()):
        raise UnknownRuleError(f"unsupported type {kind} at hook {hook}")
    tokens.expect("priority")
    priority = _parse_priority(tokens, hook)
    if priority <= _CONNTRACK_PRIORITY:
        raise UnknownRuleError(f"unsupported priority {priority}, before connection tracking")
    tokens.expect(";", "policy")
    policy = tokens.next()
    if policy not in ("accept", "drop"):
        raise UnknownRuleError(f"unsupported policy {policy}")
    tokens.expect(";")
    tokens.expect_end()
    return BaseChainHook("nat" if kind == "nat" else "filter", hook, priority, policy == "drop")


def _parse_priority(tokens: TokenReader, hook: str) -> int:
    """Parse a priority: a number, or a name with or without an offset, such as `filter` or `filter - 10`."""
    if not tokens.at_name():
        return tokens.number()
    name = tokens.next()
    priority = _PRIORITY_NAMES.get(name, _NAT_PRIORITY_NAMES.get((name, hook)))
    if priority is None:
        raise UnknownRuleError(f"unsupported priority {name} at hook {hook}")
    if tokens.accept("+"):
        return priority + tokens.number()
    return priority - tokens.number() if tokens.accept("-") else priority


# Rules.


def _parse_rule(tokens: TokenReader, scope: _TableScope) -> ListedRule:
    statements: list[PacketMatch | PacketChange] = []
    choice = None
    while tokens and not tokens.at("comment") and not choice:
        statement = parse_simple_statement(tokens, scope.family) or _parse_keyed_statement(tokens, scope)
        if isinstance(statement, VerdictChoice):
            choice = statement
        else:
            statements.append(statement)
    if tokens.accept("comment"):
        tokens.quoted()
    tokens.expect_end()
    return ListedRule(tuple(statements), choice)


def _parse_keyed_statement(tokens: TokenReader, scope: _TableScope) -> Statement:
    """Parse a `dnat` statement, or a statement that uses a key, a set or a map."""
    if tokens.accept("update"):
        return _parse_update(tokens, scope)
    if tokens.accept("dnat"):
        return _parse_dnat(tokens, scope)
    key = parse_key(tokens, scope.family)
    if tokens.accept("vmap"):
        verdicts = scope.parse_set(tokens, key, "verdict map")
        return VerdictChoice(lambda state: verdicts.lookup(key, state), verdicts.chains)
    return _parse_random_match(tokens, key) if key.modulus else _parse_comparison(tokens, scope, key)


def _parse_update(tokens: TokenReader, scope: _TableScope) -> PacketChange:
    """Parse the rest of an `update` statement, which adds the packet's source to an affinity set."""
    name, found = scope.parse_named_set(tokens)
    tokens.expect("{")
    key = parse_key(tokens, scope.family)
    tokens.expect("}")
    if not key.is_source:
        raise UnknownRuleError("unsupported update: the key must be the source address")
    found.check(key, "set")
    scope.updated.add(name)
    return PacketChange(lambda state: replace(state, affinity_recorded=True))


def _parse_dnat(tokens: TokenReader, scope: _TableScope) -> VerdictChoice:
    tokens.accept(NFT_FAMILIES[scope.family])
    tokens.expect("to")
    if not at_key(tokens, scope.family):
        target = parse_dnat_target(tokens, scope.family)
        scope.endpoints.add(target.endpoint)
        return unconditional(target.verdict())
    key = parse_key(tokens, scope.family)
    tokens.expect("map")
    endpoints = scope.parse_set(tokens, key, "endpoint map")
    return VerdictChoice(lambda state: endpoints.lookup(key, state))


def _parse_random_match(tokens: TokenReader, key: KeyExpression) -> PacketMatch:
    """Parse the right-hand side of a `numgen random mod N` match."""
    if len(key.parts) > 1:
        raise UnknownRuleError("unsupported numgen in a concatenation outside of a map lookup")
    probability = 1.0 / key.modulus if tokens.number() < key.modulus else 0.0
    return PacketMatch(lambda _: probability)


def _parse_comparison(tokens: TokenReader, scope: _TableScope, key: KeyExpression) -> PacketMatch:
    negated = tokens.accept("!=")
    if tokens.at_set_reference():
        return _parse_set_lookup(tokens, scope, key, negated=negated)
    if tokens.at("{"):
        found = scope.parse_set(tokens, key, "set")
    else:
        found = ListedSet(scope.family, key.types, "set")
        found.parse_element(tokens)
    return PacketMatch(lambda state: found.contains(key.evaluate(state)) is not negated)


def _parse_set_lookup(tokens: TokenReader, scope: _TableScope, key: KeyExpression, *, negated: bool) -> PacketMatch:
    """Parse a lookup in a named set.

    An affinity set contains the packet's source if the dump lists the source as an element, or if
    `Packet.affinity_endpoints` includes one of the set's endpoints.
    """
    name, found = scope.parse_named_set(tokens)
    found.check(key, "set")
    endpoints = scope.affinity_endpoints(name)

    def contains(state: PacketState) -> bool:
        recorded = key.is_source and not state.packet.affinity_endpoints.isdisjoint(endpoints)
        return recorded or found.contains(key.evaluate(state))

    return PacketMatch(lambda state: contains(state) is not negated)
