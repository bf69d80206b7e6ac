"""Writing the table the way nft does: whole, as `nft list table` prints it, or as commands for `nft -f`."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import singledispatch

from kproxy.model.addresses import socket_text
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS, TABLE_COMMENT
from kproxy.nftables.elements import DROP, PROTOCOLS, SetElement, unpack_address
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.ruleset import KeyField, MapValue, NftChain, NftHook, NftRule, NftSet
from kproxy.nftables.transaction import Transaction


def field_words(field: KeyField, family: Family) -> str:
    """Return what nft calls a part of a packet."""
    match field:
        case KeyField.PROTOCOL:
            return "meta l4proto"
        case KeyField.PORT:
            return "th dport"
        case _:
            return f"{table_family(family)} {field.value}"


def fields_words(fields: Iterable[KeyField], family: Family) -> str:
    """Return what nft calls several parts of a packet as one key."""
    return " . ".join(field_words(field, family) for field in fields)


@singledispatch
def words(statement: object, family: Family) -> str:
    """Return a statement the way `nft list` prints it in a table of the family."""
    raise TypeError(f"no words for {statement!r}")


@words.register
def _(statement: nft.MatchSaddr, family: Family) -> str:
    return f"{table_family(family)} saddr {_unless(statement.inside)}{_network(statement.network)}"


@words.register
def _(statement: nft.MatchDaddr, family: Family) -> str:
    return f"{table_family(family)} daddr {_unless(statement.inside)}{_network(statement.network)}"


@words.register
def _(statement: nft.MatchIifname, family: Family) -> str:
    return f'iifname {_unless(statement.inside)}"{statement.name}{"*" if statement.prefix else ""}"'


@words.register
def _(statement: nft.Lookup, family: Family) -> str:
    return f"{fields_words(statement.fields, family)} @{statement.set}"


@words.register
def _(statement: nft.FibLocal, family: Family) -> str:
    return f"fib {statement.field.value} type local"


@words.register
def _(statement: nft.MatchL4Proto, family: Family) -> str:
    return f"meta l4proto {statement.protocol.lower()}"


@words.register
def _(statement: nft.CtStateNew, family: Family) -> str:
    return "ct state new"


@words.register
def _(statement: nft.CtStatusDnat, family: Family) -> str:
    return "ct status dnat"


@words.register
def _(statement: nft.MatchMark, family: Family) -> str:
    return f"meta mark & {statement.mark:#010x} != 0x00000000"


@words.register
def _(statement: nft.Numgen, family: Family) -> str:
    return f"numgen random mod {statement.of} 0"


@words.register
def _(statement: nft.SetMark, family: Family) -> str:
    return f"meta mark set meta mark | {statement.mark:#010x}"


@words.register
def _(statement: nft.XorMark, family: Family) -> str:
    return f"meta mark set meta mark ^ {statement.mark:#010x}"


@words.register
def _(statement: nft.Masquerade, family: Family) -> str:
    return "masquerade fully-random"


@words.register
def _(statement: nft.UpdateSet, family: Family) -> str:
    return f"update @{statement.set} {{ {table_family(family)} saddr }}"


@words.register
def _(statement: nft.Dnat, family: Family) -> str:
    return f"dnat to {socket_text(statement.address, statement.port)}"


@words.register
def _(statement: nft.DnatMap, family: Family) -> str:
    key = f"{fields_words(statement.fields, family)} . numgen random mod {statement.of}"
    return f"dnat {table_family(family)} to {key} map @{statement.map}"


@words.register
def _(statement: nft.VerdictMap, family: Family) -> str:
    return f"{fields_words(statement.fields, family)} vmap @{statement.map}"


@words.register
def _(statement: nft.Go, family: Family) -> str:
    return f"{'jump' if statement.back else 'goto'} {statement.chain}"


@words.register
def _(statement: nft.Drop, family: Family) -> str:
    return "drop"


@words.register
def _(statement: nft.Return, family: Family) -> str:
    return "return"


@words.register
def _(statement: nft.Reject, family: Family) -> str:
    return "reject"


def _unless(inside: bool) -> str:
    return "" if inside else "!= "


def _network(network: str) -> str:
    """Return a network without the length of a single address, as nft prints it."""
    return network.removesuffix("/128" if ":" in network else "/32")


_PROTOCOL_NAMES = {number: name.lower() for name, number in PROTOCOLS.items()}
_PRIORITIES = {
    ("prerouting", -110): "dstnat - 10",
    ("prerouting", -100): "dstnat",
    ("input", 0): "filter",
    ("forward", 0): "filter",
    ("output", 0): "filter",
    ("postrouting", 100): "srcnat",
}
"""The names that nft prints for priorities; each has its meaning at some hooks only."""
_NUMBER_TYPE = "numgen random mod 2"  # any modulus stands for the type of all
_SETS = {each.name: each for each in SETS}


class NftWriter:
    """Writes what belongs to one family's table."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._family = family
        self._ip = table_family(family)
        self._table = f"{self._ip} {table}"
        self._address_size = 16 if family is Family.IPV6 else 4

    def table(
        self, sets: Iterable[NftSet], elements: Mapping[str, Sequence[SetElement]], chains: Iterable[NftChain]
    ) -> str:
        """Return a whole table as `nft list table` prints it; as input for `nft -f` it makes just that."""
        blocks = [self._set_block(each, elements.get(each.name, ())) for each in sets]
        blocks += [self._chain_block(each) for each in chains]
        return f'table {self._table} {{\n\tcomment "{TABLE_COMMENT}"\n' + "\n".join(blocks) + "}\n"

    def commands(self, change: Transaction) -> str:
        """Return a transaction as input for `nft -f`."""
        return "".join(f"{line}\n" for line in self._commands(change))

    def key(self, name: str, key: bytes) -> str:
        """Return the key of an element of one of the sets that are always there."""
        return self._key(_SETS[name], key)

    def element(self, owner: NftSet, element: SetElement) -> str:
        """Return an element the way it stands in a set's list of elements."""
        comment = f' comment "{element.comment}"' if element.comment else ""
        text = self._key(owner, element.key) + comment
        if element.value is None:
            return text
        if isinstance(element.value, bytes):
            address = unpack_address(element.value[: self._address_size])
            (port,) = struct.unpack_from(">H", element.value, self._address_size)
            return f"{text} : {address} . {port}"
        return f"{text} : {_verdict(element.value)}"

    def rule(self, found: NftRule) -> str:
        """Return a rule on its line."""
        comment = f' comment "{found.comment}"' if found.comment else ""
        return " ".join(words(statement, self._family) for statement in found.statements) + comment

    # Blocks

    def _set_block(self, found: NftSet, elements: Sequence[SetElement]) -> str:
        kind = "set" if found.value is MapValue.NOTHING else "map"
        lines = [f"\t{kind} {found.name} {{", *(f"\t\t{line}" for line in self._set_lines(found))]
        if elements:
            listed = ",\n\t\t\t     ".join(self.element(found, element) for element in elements)
            lines.append(f"\t\telements = {{ {listed} }}")
        return "\n".join([*lines, "\t}", ""])

    def _set_lines(self, found: NftSet) -> Iterator[str]:
        if KeyField.NUMBER in found.key:
            key = fields_words(found.key[:-1], self._family)
            yield f"typeof {key} . {_NUMBER_TYPE} : {self._ip} daddr . th dport"
        else:
            key = " . ".join(map(self._type, found.key))
            yield f"type {key} : verdict" if found.value is MapValue.VERDICT else f"type {key}"
        if found.timeout:
            yield "size 65535"
            yield "flags dynamic,timeout"
            yield f"timeout {duration(found.timeout)}"
        if found.comment:
            yield f'comment "{found.comment}"'

    def _chain_block(self, chain: NftChain) -> str:
        lines = [f"\tchain {chain.name} {{"]
        if chain.comment:
            lines.append(f'\t\tcomment "{chain.comment}"')
        if chain.hook:
            lines.append(f"\t\t{_hook(chain.hook)}")
        lines += [f"\t\t{self.rule(each)}" for each in chain.rules]
        return "\n".join([*lines, "\t}", ""])

    # Commands

    def _commands(self, change: Transaction) -> Iterator[str]:
        new_table = f'add table {self._table} {{ comment "{TABLE_COMMENT}" ; }}'
        if change.create:
            yield new_table
        if change.replace:
            yield f"delete table {self._table}"
            yield new_table
        yield from self._removals(change)
        yield from map(self._add_set, change.sets)
        yield from map(self._add_chain, change.chains)
        for chain in change.rules:
            yield from (f"add rule {self._table} {chain.name} {self.rule(each)}" for each in chain.rules)
        for name, elements in change.additions().items():
            listed = ", ".join(self.element(_SETS[name], each) for each in elements)
            yield f"add element {self._table} {name} {{ {listed} }}"
        if change.drop:
            yield f"delete table {self._table}"

    def _removals(self, change: Transaction) -> Iterator[str]:
        for name, elements in change.removed.items():
            keys = ", ".join(self.key(name, each.key) for each in elements)
            yield f"delete element {self._table} {name} {{ {keys} }}"
        yield from (f"flush chain {self._table} {name}" for name in change.flushed)
        yield from (f"delete set {self._table} {name}" for name in change.deleted_sets)
        yield from (f"delete chain {self._table} {name}" for name in change.deleted_chains)

    def _add_set(self, found: NftSet) -> str:
        kind = "set" if found.value is MapValue.NOTHING else "map"
        described = " ".join(f"{line} ;" for line in self._set_lines(found))
        return f"add {kind} {self._table} {found.name} {{ {described} }}"

    def _add_chain(self, chain: NftChain) -> str:
        hook = f"{_hook(chain.hook)} " if chain.hook else ""
        comment = f'comment "{chain.comment}" ; ' if chain.comment else ""
        return f"add chain {self._table} {chain.name} {{ {hook}{comment}}}"

    # Parts

    def _key(self, owner: NftSet, key: bytes) -> str:
        parts, place = [], 0
        for field in owner.key:
            size = self._address_size if field in {KeyField.SOURCE, KeyField.DESTINATION} else 4
            parts.append(self._key_part(field, key[place : place + size]))
            place += size
        return " . ".join(parts)

    def _key_part(self, field: KeyField, value: bytes) -> str:
        match field:
            case KeyField.SOURCE | KeyField.DESTINATION:
                return unpack_address(value)
            case KeyField.PROTOCOL:
                return _PROTOCOL_NAMES.get(value[0], str(value[0]))
            case KeyField.PORT:
                return str(int.from_bytes(value[:2], "big"))
            case KeyField.NUMBER:
                return str(int.from_bytes(value, sys.byteorder))

    def _type(self, field: KeyField) -> str:
        match field:
            case KeyField.PROTOCOL:
                return "inet_proto"
            case KeyField.PORT:
                return "inet_service"
            case _:
                return "ipv6_addr" if self._family is Family.IPV6 else "ipv4_addr"


def duration(seconds: int) -> str:
    """Return a time the way nft prints it: `1d`, `3h`, `1m30s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def _hook(hook: NftHook) -> str:
    priority = _PRIORITIES.get((hook.hook, hook.priority), str(hook.priority))
    return f"type {hook.type} hook {hook.hook} priority {priority}; policy accept;"


def _verdict(verdict: str) -> str:
    return "drop" if verdict == DROP else f"goto {verdict}"
