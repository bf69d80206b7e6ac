"""kproxy's rules are decoded exactly; rules of other programs are not decoded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.host.netlink_message import attribute, nested
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS
from kproxy.nftables.rule_content import RuleContent, canonical_expressions, rule_content
from kproxy.nftables.rule_decoder import decode_any_rule, decode_rule
from kproxy.nftables.ruleset import KeyField, MapValue

FAMILIES = pytest.mark.parametrize("family", Family)
ADDRESSES = {
    Family.IPV4: ("10.244.0.1", "192.0.2.0/25", "0.0.0.0/0"),
    Family.IPV6: ("fd00::1", "2001:db8::/47", "::/0"),
}


def statements(family: Family) -> list[nft.Statement]:
    """Return one statement of each form that the chains of Services have."""
    address, network, everything = ADDRESSES[family]
    return [
        nft.MatchSaddr(network),
        nft.MatchSaddr(f"{address}/{128 if family is Family.IPV6 else 32}", negate=True),
        nft.MatchSaddr("fd00::/16" if family is Family.IPV6 else "10.0.0.0/8"),
        nft.MatchSaddr(everything),
        nft.MatchIifname("cni0"),
        nft.MatchIifname("veth", prefix=True, negate=True),
        nft.Lookup((KeyField.SOURCE,), "affinity-AXK6CI2C-ns/web/tcp/"),
        nft.FibLocal(KeyField.SOURCE),
        nft.FibLocal(KeyField.DESTINATION, negate=True),
        nft.MatchL4Proto("SCTP"),
        nft.Numgen(7),
        nft.SetMark(0x4000),
        nft.UpdateSet("affinity-AXK6CI2C-ns/web/tcp/"),
        nft.Dnat(address, 8080),
        nft.Jump("endpoint-AXK6CI2C-ns/web/tcp/"),
        nft.Goto("endpoint-AXK6CI2C-ns/web/tcp/"),
        nft.Drop(),
        nft.Return(),
    ]


@FAMILIES
def test_each_statement_is_decoded(family: Family) -> None:
    for each in statements(family):
        rule = nft.rule(each, comment="a comment")
        assert decode_rule(rule_content(rule, family), family) == rule


@given(st.sampled_from(Family), st.data())
def test_any_sequence_is_decoded(family: Family, data: st.DataObject) -> None:
    rule = nft.rule(*data.draw(st.lists(st.sampled_from(statements(family)), max_size=6)))
    assert decode_rule(rule_content(rule, family), family) == rule


def other_statements(family: Family) -> list[nft.Statement]:
    """Return one statement of each form that only other chains have."""
    return [
        nft.Reject(),
        nft.CtStateNew(),
        nft.CtStatusDnat(),
        nft.MatchMark(0x4000),
        nft.XorMark(0x4000),
        nft.Masquerade(),
        nft.MatchSyn(),
        nft.MatchSyn(negate=True),
        nft.MatchSocket(transparent=False),
        nft.MatchSocket(transparent=True),
        nft.Count("counter"),
        nft.Lookup((KeyField.DESTINATION,), "set"),
        *(nft.Lookup(each.key, each.name) for each in SETS if each.value is MapValue.NONE),
        *(nft.VerdictMap(each.key, each.name) for each in SETS if each.value is MapValue.VERDICT),
        *(nft.DnatMap(each.key[:-1], 3, each.name) for each in SETS if each.value is MapValue.ENDPOINT),
        nft.MatchDaddr(ADDRESSES[family][1]),
        nft.MatchDaddr("::1/128" if family is Family.IPV6 else "127.0.0.0/8", negate=True),
    ]


@FAMILIES
def test_statements_that_no_chain_of_a_service_has_are_decoded_only_on_request(family: Family) -> None:
    for each in other_statements(family):
        rule = nft.rule(each)
        assert decode_rule(rule_content(rule, family), family) is None
        assert decode_any_rule(rule_content(rule, family), family) == rule


@given(st.sampled_from(Family), st.data())
def test_any_sequence_of_all_statements_is_decoded(family: Family, data: st.DataObject) -> None:
    every = [*statements(family), *other_statements(family)]
    rule = nft.rule(*data.draw(st.lists(st.sampled_from(every), max_size=6)))
    assert decode_any_rule(rule_content(rule, family), family) == rule


@FAMILIES
def test_statements_of_other_programs_are_not_decoded(family: Family) -> None:
    foreign = nft.Lookup((KeyField.SOURCE, KeyField.PORT), "set")
    assert decode_any_rule(rule_content(nft.rule(foreign), family), family) is None
    limit = RuleContent(canonical_expressions(nested(1, attribute(1, b"limit\0"), nested(2))))
    assert decode_any_rule(limit, family) is None


@given(st.sampled_from(Family), st.data())
def test_damaged_rules_are_an_error_or_another_rule(family: Family, data: st.DataObject) -> None:
    content = rule_content(nft.rule(*data.draw(st.lists(st.sampled_from(statements(family)), min_size=1))), family)
    index = data.draw(st.integers(0, len(content.expressions) - 1))
    damaged = bytearray(content.expressions[index])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    found = RuleContent((*content.expressions[:index], bytes(damaged), *content.expressions[index + 1 :]))
    decoded = decode_rule(found, family)
    assert decoded is None or rule_content(decoded, family) == found
