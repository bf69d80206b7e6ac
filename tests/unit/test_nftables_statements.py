"""Every statement is encoded for the kernel and formatted as nft prints it."""

from __future__ import annotations

from typing import get_args

import pytest

from kproxy.host.netlink_message import iterate_attributes
from kproxy.host.nf_tables_constants import NFTA_LIST_ELEM
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.expressions import encode_statement
from kproxy.nftables.nft_syntax import format_statement
from kproxy.nftables.ruleset import KeyField

KEY = (KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)
STATEMENTS: dict[nft.Statement, str] = {
    nft.MatchSaddr("10.0.0.0/8"): "ip saddr 10.0.0.0/8",
    nft.MatchDaddr("10.0.0.1/32", negate=True): "ip daddr != 10.0.0.1",
    nft.MatchIifname("cni", prefix=True): 'iifname "cni*"',
    nft.Lookup((KeyField.SOURCE,), "clients"): "ip saddr @clients",
    nft.FibLocal(KeyField.DESTINATION): "fib daddr type local",
    nft.FibLocal(KeyField.DESTINATION, negate=True): "fib daddr type != local",
    nft.MatchL4Proto("UDP"): "meta l4proto udp",
    nft.MatchSyn(): "tcp flags syn / fin,syn,rst,ack",
    nft.MatchSyn(negate=True): "tcp flags != syn / fin,syn,rst,ack",
    nft.MatchSocket(transparent=False): "socket transparent 0",
    nft.Count("rejected"): 'counter name "rejected"',
    nft.CtStateNew(): "ct state new",
    nft.CtStatusDnat(): "ct status dnat",
    nft.MatchMark(0x4000): "meta mark & 0x00004000 != 0x00000000",
    nft.Numgen(3): "numgen random mod 3 0",
    nft.SetMark(0x4000): "meta mark set meta mark | 0x00004000",
    nft.XorMark(0x4000): "meta mark set meta mark ^ 0x00004000",
    nft.Masquerade(): "masquerade fully-random",
    nft.UpdateSet("clients"): "update @clients { ip saddr }",
    nft.Dnat("10.244.0.1", 8080): "dnat to 10.244.0.1:8080",
    nft.DnatMap(KEY, 3, "endpoints"): (
        "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints"
    ),
    nft.VerdictMap(KEY, "services"): "ip daddr . meta l4proto . th dport vmap @services",
    nft.Jump("services"): "jump services",
    nft.Goto("services"): "goto services",
    nft.Drop(): "drop",
    nft.Return(): "return",
    nft.Reject(): "reject",
}
"""One statement of each type, with its text in nft's family ip."""
BY_TYPE = {type(statement): statement for statement in STATEMENTS}


@pytest.mark.parametrize("statement_type", get_args(nft.Statement))
def test_statement_is_encoded_and_formatted(statement_type: type[nft.Statement]) -> None:
    statement = BY_TYPE[statement_type]
    assert format_statement(statement, Family.IPV4) == STATEMENTS[statement]
    for family in Family:
        expressions = encode_statement(statement, family)
        assert expressions
        for expression in expressions:
            # An expression is a single attribute without trailing bytes.
            ((attribute_type, _, end),) = iterate_attributes(expression, 0, len(expression))
            assert (attribute_type, end) == (NFTA_LIST_ELEM, len(expression))
