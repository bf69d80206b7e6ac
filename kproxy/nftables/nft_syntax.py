"""Format the table in nft's syntax, either as `nft list table` prints it or as commands for `nft -f`. Pure."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import assert_never

from kproxy.model.addresses import socket_text
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS, TABLE_COMMENT
from kproxy.nftables.elements import DROP, PROTOCOLS, SetElement, unpack_address
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.ruleset import KeyField, MapValue, NftChain, NftHook, NftRule, NftSet, named_counters
from kproxy.nftables.transaction import Transaction

_PROTOCOL_NAMES = {number: name.lower() for name, number in PROTOCOLS.items()}
_PRIORITY_NAMES = {
    ("prerouting", -110): "dstnat - 10",
    ("prerouting", -100): "dstnat",
    ("input", 0): "filter",
    ("forward", 0): "filter",
    ("output", 0): "filter",
    ("postrouting", 100): "srcnat",
}
"""The names that nft prints instead of numeric priorities. Each name is valid only for some hooks."""
_NUMGEN_TYPE = "numgen random mod 2"  # the modulus has no meaning in a typeof expression
_SETS_BY_NAME = {each.name: each for each in SETS}


class NftWriter:
    """Formats the contents of one family's table."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._family = family
        self._ip = table_family(family)
        self._table = f"{self._ip} {table}"
        self._address_size = 16 if family is Family.IPV6 else 4

    def table(
        self, sets: Iterable[NftSet], elements: Mapping[str, Sequence[SetElement]], chains: Iterable[NftChain]
    ) -> str:
        """Return a whole table in the format of `nft list table`. `nft -f` accepts this format as input."""
        chains = list(chains)
        blocks = [_counter_block(name) for name in named_counters(chains)]
        blocks += [self._set_block(each, elements.get(each.name, ())) for each in sets]
        blocks += [self._chain_block(each) for each in chains]
        return f'table {self._table} {{\n\tcomment "{TABLE_COMMENT}"\n' + "\n".join(blocks) + "}\n"

    def commands(self, transaction: Transaction) -> str:
        """Return a transaction as input for `nft -f`."""
        return "".join(f"{line}\n" for line in self._commands(transaction))

    def key(self, set_name: str, key: bytes) -> str:
        """Format the key of an element. The set must be one of `base_table.SETS`."""
        return self._key(_SETS_BY_NAME[set_name], key)

    def added_element(self, set_name: str, element: SetElement) -> str:
        """Return an element as `commands` adds it. The set must be one of `base_table.SETS`."""
        return self.element(_SETS_BY_NAME[set_name], element)

    def element(self, owner: NftSet, element: SetElement) -> str:
        """Return an element of a set or map as nft prints it."""
        comment = f' comment "{element.comment}"' if element.comment else ""
        counter = " counter packets 0 bytes 0" if owner.counters else ""
        text = self._key(owner, element.key) + counter + comment
        if element.value is None:
            return text
        if isinstance(element.value, bytes):
            address = unpack_address(element.value[: self._address_size])
            (port,) = struct.unpack_from(">H", element.value, self._address_size)
            return f"{text} : {address} . {port}"
        return f"{text} : {_format_verdict(element.value)}"

    def rule(self, rule: NftRule) -> str:
        """Return a rule, including its comment, as one line."""
        comment = f' comment "{rule.comment}"' if rule.comment else ""
        return " ".join([format_statement(statement, self._family) for statement in rule.statements]) + comment

    # Blocks of a listing

    def _set_block(self, definition: NftSet, elements: Sequence[SetElement]) -> str:
        lines = [f"\t{_keyword(definition)} {definition.name} {{"]
        lines += [f"\t\t{line}" for line in self._set_properties(definition)]
        if elements:
            listed = ",\n\t\t\t     ".join(self.element(definition, element) for element in elements)
            lines.append(f"\t\telements = {{ {listed} }}")
        return "\n".join([*lines, "\t}", ""])

    def _set_properties(self, definition: NftSet) -> Iterator[str]:
        if KeyField.NUMGEN in definition.key:
            key = _format_key(definition.key[:-1], self._family)
            yield f"typeof {key} . {_NUMGEN_TYPE} : {self._ip} daddr . th dport"
        else:
            key = " . ".join(map(self._data_type, definition.key))
            yield f"type {key} : verdict" if definition.value is MapValue.VERDICT else f"type {key}"
        if definition.timeout:
            yield "size 65535"
            yield "flags dynamic,timeout"
            yield f"timeout {format_duration(definition.timeout)}"
        if definition.counters:
            yield "counter"
        if definition.comment:
            yield f'comment "{definition.comment}"'

    def _chain_block(self, chain: NftChain) -> str:
        lines = [f"\tchain {chain.name} {{"]
        if chain.comment:
            lines.append(f'\t\tcomment "{chain.comment}"')
        if chain.hook:
            lines.append(f"\t\t{_format_hook(chain.hook)}")
        lines += [f"\t\t{self.rule(each)}" for each in chain.rules]
        return "\n".join([*lines, "\t}", ""])

    # Commands

    def _commands(self, transaction: Transaction) -> Iterator[str]:
        add_table = f'add table {self._table} {{ comment "{TABLE_COMMENT}" ; }}'
        if transaction.create_table:
            yield add_table
        if transaction.replace_table:
            yield f"delete table {self._table}"
            yield add_table
        yield from self._deletions(transaction)
        yield from map(self._add_set, transaction.added_sets)
        yield from map(self._add_chain, transaction.added_chains)
        for name in named_counters(transaction.added_rules):
            yield f"add counter {self._table} {name}"
        for chain in transaction.added_rules:
            yield from (f"add rule {self._table} {chain.name} {self.rule(each)}" for each in chain.rules)
        for set_name, elements in transaction.all_added_elements().items():
            listed = ", ".join(self.added_element(set_name, each) for each in elements)
            yield f"add element {self._table} {set_name} {{ {listed} }}"
        if transaction.delete_table:
            yield f"delete table {self._table}"

    def _deletions(self, transaction: Transaction) -> Iterator[str]:
        for set_name, elements in transaction.deleted_elements.items():
            keys = ", ".join(self.key(set_name, each.key) for each in elements)
            yield f"delete element {self._table} {set_name} {{ {keys} }}"
        yield from (f"flush chain {self._table} {name}" for name in transaction.flushed_chains)
        yield from (f"delete set {self._table} {name}" for name in transaction.deleted_sets)
        yield from (f"delete chain {self._table} {name}" for name in transaction.deleted_chains)

    def _add_set(self, definition: NftSet) -> str:
        properties = " ".join(f"{line} ;" for line in self._set_properties(definition))
        return f"add {_keyword(definition)} {self._table} {definition.name} {{ {properties} }}"

    def _add_chain(self, chain: NftChain) -> str:
        hook = f"{_format_hook(chain.hook)} " if chain.hook else ""
        comment = f'comment "{chain.comment}" ; ' if chain.comment else ""
        return f"add chain {self._table} {chain.name} {{ {hook}{comment}}}"

    # Keys

    def _key(self, owner: NftSet, key: bytes) -> str:
        parts, offset = [], 0
        for field in owner.key:
            size = self._address_size if field in {KeyField.SOURCE, KeyField.DESTINATION} else 4
            parts.append(self._key_field(field, key[offset : offset + size]))
            offset += size
        return " . ".join(parts)

    def _key_field(self, field: KeyField, value: bytes) -> str:
        match field:
            case KeyField.SOURCE | KeyField.DESTINATION:
                return unpack_address(value)
            case KeyField.PROTOCOL:
                return _PROTOCOL_NAMES.get(value[0], str(value[0]))
            case KeyField.PORT:
                return str(int.from_bytes(value[:2], "big"))
            case KeyField.NUMGEN:
                return str(int.from_bytes(value, sys.byteorder))

    def _data_type(self, field: KeyField) -> str:
        match field:
            case KeyField.PROTOCOL:
                return "inet_proto"
            case KeyField.PORT:
                return "inet_service"
            case _:
                return "ipv6_addr" if self._family is Family.IPV6 else "ipv4_addr"


def format_statement(statement: nft.Statement, family: Family) -> str:
    """Return a statement as `nft list` prints it for a table of this family."""
    ip = table_family(family)
    match statement:  # the most frequent statements come first, because Python tests the cases in order
        case nft.Goto():
            return f"goto {statement.chain}"
        case nft.Lookup():
            return f"{_format_key(statement.fields, family)} @{statement.set}"
        case nft.Numgen():
            return f"numgen random mod {statement.modulus} 0"
        case nft.MatchSaddr():
            return f"{ip} saddr {_operator(negate=statement.negate)}{_format_network(statement.network)}"
        case nft.MatchDaddr():
            return f"{ip} daddr {_operator(negate=statement.negate)}{_format_network(statement.network)}"
        case nft.MatchIifname():
            wildcard = "*" if statement.prefix else ""
            return f'iifname {_operator(negate=statement.negate)}"{statement.name}{wildcard}"'
        case nft.FibLocal():
            return f"fib {statement.field.value} type {_operator(negate=statement.negate)}local"
        case nft.MatchL4Proto():
            return f"meta l4proto {statement.protocol.lower()}"
        case nft.CtStateNew():
            return "ct state new"
        case nft.CtStatusDnat():
            return "ct status dnat"
        case nft.MatchMark():
            return f"meta mark & {statement.mark:#010x} != 0x00000000"
        case nft.SetMark():
            return f"meta mark set meta mark | {statement.mark:#010x}"
        case nft.XorMark():
            return f"meta mark set meta mark ^ {statement.mark:#010x}"
        case nft.Masquerade():
            return "masquerade fully-random"
        case nft.UpdateSet():
            return f"update @{statement.set} {{ {ip} saddr }}"
        case nft.Dnat():
            return f"dnat to {socket_text(statement.address, statement.port)}"
        case nft.DnatMap():
            key = f"{_format_key(statement.fields, family)} . numgen random mod {statement.modulus}"
            return f"dnat {ip} to {key} map @{statement.map}"
        case nft.VerdictMap():
            return f"{_format_key(statement.fields, family)} vmap @{statement.map}"
        case nft.Jump():
            return f"jump {statement.chain}"
        case nft.MatchSyn():
            return f"tcp flags {_operator(negate=statement.negate)}syn / fin,syn,rst,ack"
        case nft.MatchSocket():
            return f"socket transparent {int(statement.transparent)}"
        case nft.Count():
            return f'counter name "{statement.counter}"'
        case nft.Drop():
            return "drop"
        case nft.Return():
            return "return"
        case nft.Reject():
            return "reject"
        case _:
            assert_never(statement)


def _counter_block(name: str) -> str:
    return f"\tcounter {name} {{\n\t\tpackets 0 bytes 0\n\t}}\n"


def format_duration(seconds: int) -> str:
    """Return a duration as nft prints it: `1d`, `3h`, `1m30s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def _format_key(fields: Iterable[KeyField], family: Family) -> str:
    """Return the fields of a key as nft prints their concatenation."""
    return " . ".join(_format_field(field, family) for field in fields)


def _format_field(field: KeyField, family: Family) -> str:
    match field:
        case KeyField.PROTOCOL:
            return "meta l4proto"
        case KeyField.PORT:
            return "th dport"
        case _:
            return f"{table_family(family)} {field.value}"


def _operator(*, negate: bool) -> str:
    return "!= " if negate else ""


def _format_network(network: str) -> str:
    """Return a network as nft prints it. The prefix length is omitted if the network is one address."""
    return network.removesuffix("/128" if ":" in network else "/32")


def _keyword(definition: NftSet) -> str:
    return "set" if definition.value is MapValue.NONE else "map"


def _format_hook(hook: NftHook) -> str:
    priority = _PRIORITY_NAMES.get((hook.hook, hook.priority), str(hook.priority))
    return f"type {hook.type} hook {hook.hook} priority {priority}; policy accept;"


def _format_verdict(verdict: str) -> str:
    return "drop" if verdict == DROP else f"goto {verdict}"
