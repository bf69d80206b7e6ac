"""Evaluate the rules of the fake kernels: every outcome that a packet may have, whatever random numbers it draws."""

from __future__ import annotations

import re
from functools import lru_cache

from msgspec import Struct

from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables import ruleset as nft
from kproxy.nftables.elements import DROP as DROP_VERDICT
from kproxy.nftables.elements import endpoint_key, node_port_key, pack_address, service_key, unpack_address
from tests.faketable import FakeChain, TableState
from tests.simulation.outcomes import DROP, NONE, REJECT, Frontend, contains

MAX_DEPTH = 12
"""A packet passes fewer chains than this."""


class Packet(Struct, frozen=True):
    """The first packet of a connection to a frontend. `destination` is an address of this node if it is `local`."""

    frontend: Frontend
    source: str
    destination: str
    local: bool


def nftables_outcomes(table: TableState | None, packet: Packet) -> frozenset[str]:
    """Return the possible outcomes of a packet that arrives at the node."""
    if table is None:
        return frozenset({NONE})
    evaluation = _Nftables(table, packet)
    found: set[str] = set()
    for hook in ("prerouting", "input" if packet.local else "forward"):
        chains = [(name, chain) for name, chain in table.chains.items() if chain.hook and chain.hook.hook == hook]
        for name, _ in sorted(chains, key=_priority):
            outcomes, falls = evaluation.run(name, 0)
            found |= outcomes
            if not falls:
                return frozenset(found)
    return frozenset((*found, NONE))


def _priority(item: tuple[str, FakeChain]) -> int:
    assert item[1].hook is not None
    return item[1].hook.priority


_FINAL = {nft.VerdictMap, nft.Jump, nft.DnatMap, nft.Goto, nft.Dnat, nft.Return, nft.Drop, nft.Reject}
"""The statements at the end of a rule that decide where a packet goes."""
Result = tuple[set[str], bool]
"""The final outcomes of a chain, and whether a packet may leave its end."""


class _Nftables:
    """The evaluation of one packet in an nftables table."""

    def __init__(self, table: TableState, packet: Packet) -> None:
        self.table = table
        self.packet = packet
        frontend = packet.frontend
        self.node_port_key = node_port_key(frontend.protocol, frontend.port)  # type: ignore[arg-type]
        self.service_key = service_key(packet.destination, frontend.protocol, frontend.port)  # type: ignore[arg-type]

    def run(self, name: str, depth: int) -> Result:
        outcomes: set[str] = set()
        chain = self.table.chains.get(name)
        assert depth < MAX_DEPTH, "a loop of chains"
        assert chain is not None, f"a jump to the missing chain {name}"
        for rule in chain.rules:
            found, ends, leaves = self._rule(rule, depth)
            outcomes |= found
            if leaves:
                return outcomes, True
            if ends:
                return outcomes, False
        return outcomes, True

    def _rule(self, rule: nft.NftRule, depth: int) -> tuple[set[str], bool, bool]:
        """Return the final outcomes, whether every packet ends here, and whether every packet leaves the chain."""
        certain = True
        for statement in rule.statements:
            kind = type(statement)
            if kind in _FINAL:
                found, ends, leaves = self._final(statement, depth)
                return found, ends and certain, leaves and certain
            if kind is nft.Numgen:
                certain = certain and statement.modulus == 1  # type: ignore[union-attr]
            elif kind is nft.Lookup and statement.set.startswith("affinity-"):  # type: ignore[union-attr]
                certain = False
            elif not self._matches(statement):
                break
        return set(), False, False

    def _final(  # noqa: PLR0911 - one return for each kind of statement
        self, statement: nft.Statement, depth: int
    ) -> tuple[set[str], bool, bool]:
        match statement:
            case nft.VerdictMap():
                return self._verdict(statement, depth)
            case nft.Jump():
                found, falls = self.run(statement.chain, depth + 1)
                return found, not falls, False
            case nft.DnatMap():
                return *self._dnat(statement), False
            case nft.Goto():
                found, falls = self.run(statement.chain, depth + 1)
                return found, not falls, falls
            case nft.Dnat():
                return {_socket(pack_address(statement.address), statement.port)}, True, False
            case nft.Return():
                return set(), False, True
            case _:
                return {REJECT if isinstance(statement, nft.Reject) else DROP}, True, False

    def _verdict(self, statement: nft.VerdictMap, depth: int) -> tuple[set[str], bool, bool]:
        by_port = len(statement.fields) == 2
        element = self.table.sets[statement.map].elements.get(self.node_port_key if by_port else self.service_key)
        if element is None:
            return set(), False, False
        if element.value == DROP_VERDICT:
            return {DROP}, True, False
        found, falls = self.run(str(element.value), depth + 1)
        return found, not falls, falls

    def _dnat(self, statement: nft.DnatMap) -> tuple[set[str], bool]:
        key = self.node_port_key if len(statement.fields) == 2 else self.service_key
        elements = self.table.sets[statement.map].elements
        found = [elements.get(endpoint_key(key, index)) for index in range(statement.modulus)]
        values = [each.value for each in found if each is not None and isinstance(each.value, bytes)]
        return {_unpacked(value) for value in values}, len(values) == statement.modulus

    def _matches(self, statement: nft.Statement) -> bool:  # noqa: PLR0911 - as above
        packet = self.packet
        match statement:
            case nft.MatchSaddr():
                return contains(statement.network, packet.source) != statement.negate
            case nft.MatchDaddr():
                return contains(statement.network, packet.destination) != statement.negate
            case nft.Lookup():
                key = pack_address(packet.destination)
                return statement.set in {names.CLUSTER_IPS, names.NODE_PORT_IPS} and (
                    key in self.table.sets[statement.set].elements
                )
            case nft.FibLocal():
                return statement.field is nft.KeyField.DESTINATION and packet.local
            case nft.MatchL4Proto():
                return statement.protocol == packet.frontend.protocol
            case nft.CtStatusDnat() | nft.MatchMark():
                return False
            case nft.MatchIifname():
                return statement.negate
            case _:
                return True


@lru_cache(1 << 12)
def _unpacked(value: bytes) -> str:
    return _socket(value[:-4], int.from_bytes(value[-4:-2], "big"))


def _socket(address: bytes, port: int) -> str:
    text = unpack_address(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


# iptables


class ParsedRule(Struct, frozen=True):
    """The parts of an iptables rule that decide what happens to a packet to a Service. "!" at the start negates."""

    source: str
    destination: str
    protocol: str
    first_port: int
    last_port: int
    to_local: bool
    from_local: bool
    never: bool
    maybe: bool
    target: str
    endpoint: str


_TARGET = re.compile(r"-j (\S+)(?: --to-destination (\S+))?")


@lru_cache(1 << 14)
def parse_rule(text: str) -> ParsedRule:
    """Parse a rule as the fake kernel stores it."""
    text = re.sub(r'--comment "[^"]*"', "", text)
    target = _TARGET.search(text)
    first, _, last = _option(text, "--dport").partition(":")
    return ParsedRule(
        _option(text, "-s"),
        _option(text, "-d"),
        _option(text, "-p").upper(),
        int(first or 0),
        int(last or first or 65535),
        "--dst-type LOCAL" in text,
        "--src-type LOCAL" in text,
        any(each in text for each in ("--ctstate INVALID", "--ctstate RELATED", "-m mark --mark")),
        "-m statistic" in text or "--rcheck" in text,
        target[1] if target else "",
        (target[2] or "") if target else "",
    )


def _option(text: str, name: str) -> str:
    found = re.search(rf"(! )?(?<!\S){name} (\S+)", text)
    return f"{'!' if found[1] else ''}{found[2]}" if found else ""


def iptables_outcomes(tables: dict[str, dict[str, list[str]]], packet: Packet) -> frozenset[str]:
    """Return the possible outcomes of a packet that arrives at the node."""
    outcomes, falls = _run_iptables(tables["nat"], "PREROUTING", packet, 0)
    if falls:
        outcomes.discard(NONE)
        filtered, falls = _run_iptables(tables["filter"], "INPUT" if packet.local else "FORWARD", packet, 0)
        outcomes |= filtered
    return frozenset((*outcomes, NONE)) if falls else frozenset(outcomes)


def _run_iptables(chains: dict[str, list[str]], name: str, packet: Packet, depth: int) -> Result:
    outcomes: set[str] = set()
    assert depth < MAX_DEPTH, "a loop of chains"
    assert name in chains, f"a jump to the missing chain {name}"
    for text in chains[name]:
        rule = parse_rule(text)
        if not rule.target or not _matches(rule, packet):
            continue
        falls = True
        match rule.target:
            case "MARK" | "MASQUERADE":
                continue
            case "RETURN":
                if not rule.maybe:
                    return outcomes, True
                continue
            case "DROP" | "REJECT":
                outcomes.add(rule.target.lower())
                falls = False
            case "DNAT":
                outcomes.add(rule.endpoint)
                falls = False
            case "ACCEPT":
                outcomes.add(NONE)
                falls = False
            case target:
                found, falls = _run_iptables(chains, target, packet, depth + 1)
                outcomes |= found
        if not falls and not rule.maybe:
            return outcomes, False
    return outcomes, True


def _matches(rule: ParsedRule, packet: Packet) -> bool:
    return (
        not rule.never
        and not rule.from_local
        and rule.first_port <= packet.frontend.port <= rule.last_port
        and (not rule.protocol or rule.protocol == packet.frontend.protocol)
        and _in_network(rule.destination, packet.destination)
        and _in_network(rule.source, packet.source)
        and (packet.local or not rule.to_local)
    )


def _in_network(network: str, address: str) -> bool:
    if not network:
        return True
    return contains(network.removeprefix("!"), address) != network.startswith("!")


def packet_to(frontend: Frontend, source: str, family: Family) -> Packet:
    """Return a packet to a frontend."""
    node = "fd00:99::2" if family is Family.IPV6 else "10.99.0.2"
    return Packet(frontend, source, frontend.address or node, not frontend.address)
