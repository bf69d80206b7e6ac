"""Statements in nft's words."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch

from kproxy.model.endpoints import socket_text
from kproxy.model.types import Family
from kproxy.nftables import objects as nft
from kproxy.nftables.names import table_family
from kproxy.nftables.objects import Field


def field_words(field: Field, family: Family) -> str:
    """Return what nft calls a part of a packet."""
    match field:
        case Field.PROTOCOL:
            return "meta l4proto"
        case Field.PORT:
            return "th dport"
        case _:
            return f"{table_family(family)} {field.value}"


def fields_words(fields: Iterable[Field], family: Family) -> str:
    """Return what nft calls several parts of a packet as one key."""
    return " . ".join(field_words(field, family) for field in fields)


@singledispatch
def words(statement: object, family: Family) -> str:
    """Return a statement the way `nft list` prints it in a table of the family."""
    raise TypeError(f"no words for {statement!r}")


@words.register
def _(statement: nft.Source, family: Family) -> str:
    return f"{table_family(family)} saddr {_unless(statement.inside)}{_network(statement.network)}"


@words.register
def _(statement: nft.Destination, family: Family) -> str:
    return f"{table_family(family)} daddr {_unless(statement.inside)}{_network(statement.network)}"


@words.register
def _(statement: nft.Interface, family: Family) -> str:
    return f'iifname {_unless(statement.inside)}"{statement.name}{"*" if statement.prefix else ""}"'


@words.register
def _(statement: nft.IsIn, family: Family) -> str:
    return f"{fields_words(statement.fields, family)} @{statement.set}"


@words.register
def _(statement: nft.IsLocal, family: Family) -> str:
    return f"fib {statement.field.value} type local"


@words.register
def _(statement: nft.IsProtocol, family: Family) -> str:
    return f"meta l4proto {statement.protocol.lower()}"


@words.register
def _(statement: nft.IsNew, family: Family) -> str:
    return "ct state new"


@words.register
def _(statement: nft.IsTranslated, family: Family) -> str:
    return "ct status dnat"


@words.register
def _(statement: nft.IsMarked, family: Family) -> str:
    return f"meta mark & {statement.mark:#010x} != 0x00000000"


@words.register
def _(statement: nft.Chance, family: Family) -> str:
    return f"numgen random mod {statement.of} 0"


@words.register
def _(statement: nft.Mark, family: Family) -> str:
    return f"meta mark set meta mark | {statement.mark:#010x}"


@words.register
def _(statement: nft.Unmark, family: Family) -> str:
    return f"meta mark set meta mark ^ {statement.mark:#010x}"


@words.register
def _(statement: nft.Masquerade, family: Family) -> str:
    return "masquerade fully-random"


@words.register
def _(statement: nft.Remember, family: Family) -> str:
    return f"update @{statement.set} {{ {table_family(family)} saddr }}"


@words.register
def _(statement: nft.SendTo, family: Family) -> str:
    return f"dnat to {socket_text(statement.address, statement.port)}"


@words.register
def _(statement: nft.Pick, family: Family) -> str:
    key = f"{fields_words(statement.fields, family)} . numgen random mod {statement.of}"
    return f"dnat {table_family(family)} to {key} map @{statement.map}"


@words.register
def _(statement: nft.Decide, family: Family) -> str:
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
