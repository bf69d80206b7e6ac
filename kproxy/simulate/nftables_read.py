"""Reading the table that `nft list table` printed into chains that can be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TypeVar

from msgspec import Struct, field

from kproxy.model.types import Family
from kproxy.simulate.nftables_fields import TABLES
from kproxy.simulate.nftables_hooks import Base, read_base
from kproxy.simulate.nftables_rules import Rule, Scope, read_rule
from kproxy.simulate.nftables_sets import Elements, read_property
from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError

_T = TypeVar("_T")

_BLOCKS = ("set", "map", "chain")
_SHOWN = 200
"""How much of a line an error shows, in characters; some lines hold all elements of a map."""


class Chain(Struct):
    """A chain's rules, and for a base chain what makes it one."""

    rules: list[Rule] = field(default_factory=list)
    base: Base | None = None


class Line(Struct, frozen=True):
    """What belongs together: a line, or several if braces are open at the end. The number is that of the first."""

    number: int
    text: str

    def read(self, reader: Callable[[Words], _T]) -> _T:
        """Return what the reader makes of the line; its errors say where and in what."""
        try:
            return reader(Words(self.text))
        except UnknownRuleError as error:
            shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
            raise UnknownRuleError(f"line {self.number}: {error}: {shown}") from None


class Block(Struct):
    """A set, map or chain as it stands in the table."""

    kind: str
    name: str
    lines: list[Line] = field(default_factory=list)


def read_dump(text: str, family: Family) -> dict[str, Chain]:
    """Return the chains of the table that `nft list table` printed, none for an empty text.

    Raises `UnknownRuleError` at whatever has no known meaning.
    """
    blocks = _read_blocks(text, family)
    sets = {block.name: _read_set(block, family) for block in blocks if block.kind != "chain"}
    scope = Scope(family, sets)
    chains = {block.name: _read_chain(block, scope) for block in blocks if block.kind == "chain"}
    if len(sets) + len(chains) < len(blocks):
        raise UnknownRuleError("two sets or two chains have one name")
    _check_targets(chains)
    _check_order(chains)
    return chains


def base_chains(chains: dict[str, Chain], hook: str) -> list[tuple[Base, Chain]]:
    """Return the base chains of a hook in the order in which the kernel runs them."""
    found = [(chain.base, chain) for chain in chains.values() if chain.base and chain.base.hook == hook]
    return sorted(found, key=lambda each: each[0].order)


def _read_blocks(text: str, family: Family) -> list[Block]:
    lines = _lines(text)
    first = next(lines, None)
    if first is None:
        return []
    first.read(lambda words: _read_table(words, family))
    blocks: list[Block] = []
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


def _lines(text: str) -> Iterator[Line]:
    """Yield the lines of a dump that hold anything. A `{` at the end opens a block, any other must be closed."""
    number, parts, depth = 0, list[str](), 0
    for place, line in enumerate(text.splitlines(), 1):
        part = line.strip()
        if not part:
            continue
        number = number if parts else place
        parts.append(part)
        depth += Line(place, part).read(lambda words: words.open_braces)
        if depth <= 0 or (len(parts) == 1 and (part.endswith("{") or part == "}")):
            yield Line(number, " ".join(parts))
            parts, depth = [], 0
    if parts:
        raise UnknownRuleError(f"line {number}: braces are open at the end: {parts[0]}")


def _until_brace(head: Line, lines: Iterator[Line]) -> Iterator[Line]:
    for line in lines:
        if line.text == "}":
            return
        yield line
    raise UnknownRuleError(f"line {head.number}: a block without its end: {head.text}")


def _read_table(words: Words, family: Family) -> None:
    words.expect("table", TABLES[family])
    words.next()
    words.expect("{")
    words.end()


def _read_head(words: Words) -> Block | None:
    """Take what begins a block of the table; None for the table's comment."""
    kind = words.next()
    if kind == "comment":
        words.text()
        words.end()
        return None
    if kind not in _BLOCKS:
        raise UnknownRuleError(f"{kind} is not known here, only {', '.join(_BLOCKS)}")
    block = Block(kind, words.next())
    words.expect("{")
    words.end()
    return block


def _refuse(_: Words) -> None:
    raise UnknownRuleError("a second table is not known")


def _read_set(block: Block, family: Family) -> Elements:
    found: Elements | None = None
    for line in block.lines:
        found = line.read(partial(read_property, found=found, family=family, is_map=block.kind == "map"))
    if found is None:
        raise UnknownRuleError(f"{block.kind} {block.name} has no type")
    return found


def _read_chain(block: Block, scope: Scope) -> Chain:
    chain = Chain()
    for line in block.lines:
        line.read(lambda words: _read_chain_line(words, chain, scope))
    scope.end_chain()
    return chain


def _read_chain_line(words: Words, chain: Chain, scope: Scope) -> None:
    if words.take("type") and not chain.base:
        chain.base = read_base(words)
    elif words.sees("comment") and not chain.rules:
        words.next()
        words.text()
        words.end()
    else:
        chain.rules.append(read_rule(words, scope))


def _check_targets(chains: dict[str, Chain]) -> None:
    for name, chain in chains.items():
        for rule in chain.rules:
            missing = rule.choice.chains - chains.keys() if rule.choice else ()
            if missing:
                raise UnknownRuleError(f"chain {name}: there is no chain {', '.join(sorted(missing))}")


def _check_order(chains: dict[str, Chain]) -> None:
    """Refuse base chains of which a dump does not tell who is run first."""
    for hook in {chain.base.hook for chain in chains.values() if chain.base}:
        for (one, _), (other, _) in pairwise(base_chains(chains, hook)):
            if one.order == other.order or (one.type != other.type and one.order[0] == other.order[0]):
                raise UnknownRuleError(f"two base chains at hook {hook} have the same priority")
