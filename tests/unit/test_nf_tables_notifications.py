"""Notifications about nf_tables commits, recorded from Linux 6.18 and nft 1.0.6, are decoded into what was touched."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.host.nf_tables_notifications import MAX_TOUCHED_CHAINS, CommitDecoder
from kproxy.model.drift import MAX_TOUCHED_ELEMENTS, CommitAuthor, RulesChanged, Touched
from kproxy.model.types import Family

IPV4, IPV6 = (Family.IPV4, "kube-proxy"), (Family.IPV6, "kube-proxy")
TABLES = (IPV4, IPV6)

# nft 'add rule ip kube-proxy c tcp dport {80, 443} drop'
RULE = (
    bytes.fromhex(
        "a0000000090a000401000000053e0000020000030f0001006b7562652d70726f787900000b0002005f5f7365743000000c00"
        "100000000000000000030800030000000003080004000000000d080005000000000220000d00000402000000031400040700"
        "0000010c0004080000000104020000000c000900080001000000000217001300307866666666666666663832353039303230"
        "00000800140000000002440000000c0a000400000000053e0000020000030f0001006b7562652d70726f787900000b000200"
        "5f5f73657430000014000300100001000c0001000600010000500000440000000c0a000400000000053e0000020000030f00"
        "01006b7562652d70726f787900000b0002005f5f73657430000014000300100001000c0001000600010001bb000020010000"
        "060a000c03000000053e0000020000030f0001006b7562652d70726f7879000006000200630000000c000300000000000000"
        "0004e800040024000100090001006d6574610000000014000200080002000000001008000100000000012c00010008000100"
        "636d700020000200080001000000000108000200000000000c0003000500010006000000340001000c0001007061796c6f61"
        "6400240002000800010000000001080002000000000208000300000000020800040000000002300001000b0001006c6f6f6b"
        "75700000200002000b0001005f5f73657430000008000200000000010800050000000000300001000e000100696d6d656469"
        "6174650000001c0002000800010000000000100002000c0002000800010000000000"
    ),
    bytes.fromhex("2c0000000f0a000001000000053e00000000000308000100000000030800020000003e05080003006e667400"),
)

# nft 'add element ip kube-proxy s { 10.0.0.1, 10.0.0.2 }'
ELEMENTS = (
    bytes.fromhex(
        "400000000c0a000400000000063e0000020000040f0001006b7562652d70726f787900000600020073000000140003001000"
        "01000c000100080001000a000001400000000c0a000400000000063e0000020000040f0001006b7562652d70726f78790000"
        "060002007300000014000300100001000c000100080001000a000002"
    ),
    bytes.fromhex("2c0000000f0a000001000000063e00000000000408000100000000040800020000003e06080003006e667400"),
)

# nft 'add table ip6 kube-proxy { flags dormant; }'
DORMANT = (
    bytes.fromhex(
        "40000000000a000001000000083e00000a0000050f0001006b7562652d70726f7879000008000300000000000c0004000000"
        "0000000000020800020000000001"
    ),
    bytes.fromhex("2c0000000f0a000001000000083e00000000000508000100000000050800020000003e08080003006e667400"),
)

# nft 'add element ip kube-proxy s { 10.0.0.3 }; add chain ip6 kube-proxy d; add element ip other s { 10.0.0.3 }'
BOTH = (
    bytes.fromhex(
        "400000000c0a000400000000093e0000020000060f0001006b7562652d70726f787900000600020073000000140003001000"
        "01000c000100080001000a00000340000000030a000402000000093e00000a0000060f0001006b7562652d70726f78790000"
        "06000300640000000c000200000000000000000108000600000000003c0000000c0a000400000000093e0000020000060a00"
        "01006f74686572000000060002007300000014000300100001000c000100080001000a000003"
    ),
    bytes.fromhex("2c0000000f0a000001000000093e00000000000608000100000000060800020000003e09080003006e667400"),
)

# nft 'add element ip other s { 10.0.0.4 }'
OTHER = (
    bytes.fromhex(
        "3c0000000c0a0004000000000a3e0000020000070a0001006f74686572000000060002007300000014000300100001000c00"
        "0100080001000a000004"
    ),
    bytes.fromhex("2c0000000f0a0000010000000a3e00000000000708000100000000070800020000003e0a080003006e667400"),
)

# nft 'add element ip kube-proxy s { * }'
CATCHALL = (
    bytes.fromhex(
        "3c0000000c0a0004000000000c3e0000020000080f0001006b7562652d70726f787900000600020073000000100003000c00"
        "01000800030000000002"
    ),
    bytes.fromhex("2c0000000f0a0000010000000c3e00000000000808000100000000080800020000003e0c080003006e667400"),
)

# nft 'flush chain ip kube-proxy c; delete chain ip kube-proxy c'
DELCHAIN = (
    bytes.fromhex(
        "20010000080a0000010000000d3e0000020000090f0001006b7562652d70726f7879000006000200630000000c0003000000"
        "000000000004e800040024000100090001006d6574610000000014000200080002000000001008000100000000012c000100"
        "08000100636d700020000200080001000000000108000200000000000c0003000500010006000000340001000c0001007061"
        "796c6f616400240002000800010000000001080002000000000208000300000000020800040000000002300001000b000100"
        "6c6f6f6b75700000200002000b0001005f5f73657430000008000200000000010800050000000000300001000e000100696d"
        "6d6564696174650000001c0002000800010000000000100002000c00020008000100000000003c0000000b0a000001000000"
        "0d3e0000020000090f0001006b7562652d70726f787900000b0002005f5f7365743000000c00100000000000000000033800"
        "0000050a0000020000000d3e0000020000090f0001006b7562652d70726f7879000006000300630000000c00020000000000"
        "00000002"
    ),
    bytes.fromhex("2c0000000f0a0000010000000d3e00000000000908000100000000090800020000003e0d080003006e667400"),
)

# nft rename chain ip kube-proxy c d
RENAME = (
    bytes.fromhex(
        "40000000030a000001000000d2700000020000030f0001006b7562652d70726f7879000006000300640000000c0002000000"
        "0000000000010800060000000000"
    ),
    bytes.fromhex("2c0000000f0a000001000000d270000000000003080001000000000308000200000070d2080003006e667400"),
)

# iptables-nft -t nat -N FOREIGN
CREATE = (
    bytes.fromhex(
        "3c000000030a0002020000009319000002000005080001006e6174000c000300464f524549474e000c000200000000000000"
        "00020800060000000000"
    ),
    bytes.fromhex(
        "380000000f0a0000020000009319000000000005080001000000000508000200000019931100030069707461626c65732d6e"
        "667400000000"
    ),
)

# iptables-nft -t nat -P OUTPUT ACCEPT
POLICY = (
    bytes.fromhex(
        "68000000030a000402000000c571000002000009080001006e6174000b0003004f555450555400000c000200000000000000"
        "000214000400080001000000000308000200ffffff9c0800050000000001080007006e61740008000a000000000108000600"
        "0000000084000000030a000003000000c571000002000009080001006e6174000b0003004f555450555400000c0002000000"
        "00000000000214000400080001000000000308000200ffffff9c0800050000000001080007006e6174001c0008000c000200"
        "00000000000000000c000100000000000000000008000a00000000010800060000000000"
    ),
    bytes.fromhex(
        "380000000f0a000002000000c571000000000009080001000000000908000200000071c51100030069707461626c65732d6e"
        "667400000000"
    ),
)

# nft 'flush ruleset'
FLUSH = (
    bytes.fromhex(
        "380000000b0a0000010000000f3e00000200000a0f0001006b7562652d70726f7879000006000200730000000c0010000000"
        "00000000000138000000020a0000010000000f3e00000200000a0f0001006b7562652d70726f787900000800030000000000"
        "0c000400000000000000000138000000050a0000010000000f3e00000a00000a0f0001006b7562652d70726f787900000600"
        "0300640000000c000200000000000000000138000000020a0000010000000f3e00000a00000a0f0001006b7562652d70726f"
        "7879000008000300000000000c0004000000000000000002340000000b0a0000010000000f3e00000200000a0a0001006f74"
        "68657200000006000200730000000c001000000000000000000134000000020a0000010000000f3e00000200000a0a000100"
        "6f7468657200000008000300000000000c0004000000000000000003"
    ),
    bytes.fromhex("2c0000000f0a0000010000000f3e00000000000a080001000000000a0800020000003e0f080003006e667400"),
)

FAKE_KEY = bytes.fromhex("0a000001")


def decoder(own_port: int = 0) -> CommitDecoder:
    return CommitDecoder(TABLES, lambda port: port == own_port)


def decode(datagrams: Iterable[bytes], own_port: int = 0) -> RulesChanged | None:
    found = decoder(own_port)
    for datagram in datagrams:
        found.feed(datagram)
    return found.take()


def test_rule_with_an_anonymous_set_touches_its_chain() -> None:
    assert decode(RULE) == RulesChanged({IPV4: Touched(chains={"c"}, by={"nft"})})


def test_elements_are_touched_by_key() -> None:
    keys = {bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])}
    assert decode(ELEMENTS) == RulesChanged({IPV4: Touched(elements={"s": keys}, by={"nft"})})


def test_flags_of_a_table_touch_everything_in_it() -> None:
    assert decode(DORMANT) == RulesChanged({IPV6: Touched(everything=True, by={"nft"})})


def test_renamed_chain_touches_everything_in_its_table() -> None:
    """The notification does not contain the old name."""
    assert decode(RENAME) == RulesChanged({IPV4: Touched(everything=True, chains={"d"}, by={"nft"})})


@pytest.mark.parametrize(("commit", "chain"), [(CREATE, "FOREIGN"), (POLICY, "OUTPUT")])
def test_new_chain_and_policy_of_a_builtin_chain_touch_only_this_chain(commit: tuple[bytes, ...], chain: str) -> None:
    nat = (Family.IPV4, "nat")
    found = CommitDecoder([nat], lambda _: False)
    for datagram in commit:
        found.feed(datagram)
    assert found.take() == RulesChanged({nat: Touched(chains={chain}, by={"iptables-nft"})})


def test_one_commit_can_touch_several_tables() -> None:
    touched = {
        IPV4: Touched(elements={"s": {bytes([10, 0, 0, 3])}}, by={"nft"}),
        IPV6: Touched(chains={"d"}, by={"nft"}),
    }
    assert decode(BOTH) == RulesChanged(touched)


def test_catch_all_element_touches_the_whole_set() -> None:
    assert decode(CATCHALL) == RulesChanged({IPV4: Touched(sets={"s"}, by={"nft"})})


def test_deleted_chain_is_touched() -> None:
    assert decode(DELCHAIN) == RulesChanged({IPV4: Touched(chains={"c"}, by={"nft"})})


def test_flushed_ruleset_touches_everything_in_both_tables() -> None:
    changed = decode(FLUSH)
    assert changed is not None
    assert {table: touched.everything for table, touched in changed.tables.items()} == {IPV4: True, IPV6: True}


def test_other_tables_are_not_reported() -> None:
    assert decode(OTHER) is None


def test_own_commits_are_not_reported() -> None:
    (port,) = struct.unpack_from("=12xI", ELEMENTS[0])
    assert decode(ELEMENTS, own_port=port) is None
    assert decode((*ELEMENTS, *RULE), own_port=port) == decode(RULE)


def test_nothing_is_reported_before_the_end_of_the_commit() -> None:
    found = decoder()
    found.feed(ELEMENTS[0])
    assert found.take() is None
    found.feed(ELEMENTS[1])
    assert found.take() is not None
    assert found.take() is None


def test_commits_that_arrive_together_are_reported_together() -> None:
    changed = decode((*ELEMENTS, *RULE, *OTHER))
    assert changed is not None
    assert changed.tables[IPV4].chains == {"c"}
    assert changed.tables[IPV4].elements.keys() == {"s"}


def test_too_many_elements_touch_the_whole_set() -> None:
    found = decoder()
    for number in range(MAX_TOUCHED_ELEMENTS + 1):
        found.feed(ELEMENTS[0].replace(FAKE_KEY, number.to_bytes(4, "big")))
    found.feed(ELEMENTS[1])
    assert found.take() == RulesChanged({IPV4: Touched(sets={"s"}, by={"nft"})})


def test_too_many_chains_touch_the_whole_table() -> None:
    nat = (Family.IPV4, "nat")
    found = CommitDecoder([nat, (Family.IPV6, "nat")], lambda _: False)
    for number in range(MAX_TOUCHED_CHAINS + 100):
        found.feed(CREATE[0].replace(b"FOREIGN", b"%07d" % number))
    found.feed(CREATE[1])
    changed = found.take()
    assert changed is not None
    assert list(changed.tables) == [nat]
    assert changed.tables[nat].everything
    assert changed.tables[nat].by == {"iptables-nft"}
    assert len(changed.tables[nat].chains) == MAX_TOUCHED_CHAINS + 1


def test_change_of_a_part_belongs_to_its_commit_although_everything_in_the_table_is_touched() -> None:
    found = decoder()
    for datagram in (*RENAME, ELEMENTS[0]):
        found.feed(datagram)
    assert found.take() is None
    found.feed(ELEMENTS[1].replace(b"nft\0", b"add\0"))
    assert found.take() == RulesChanged({IPV4: Touched(everything=True, chains={"d"}, by={"nft", "add"})})
    # The other family has a table of the same name.
    changed = decode((*RENAME, *BOTH))
    assert changed is not None
    assert changed.tables[IPV6] == Touched(chains={"d"}, by={"nft"})


def test_discarded_commits_are_not_reported_and_the_last_generation_is_known() -> None:
    found = decoder()
    assert found.generation is None
    for datagram in (*RULE, *OTHER, ELEMENTS[0]):
        found.feed(datagram)
    assert found.generation == 7
    assert found.discard()
    assert not found.discard()
    assert found.take() is None
    found.feed(ELEMENTS[1])
    assert found.take() is None


@given(st.sampled_from([RULE, ELEMENTS, BOTH, RENAME, FLUSH]), st.data())
def test_damaged_datagrams_raise_no_error(datagrams: tuple[bytes, ...], data: st.DataObject) -> None:
    found = decoder()
    for datagram in datagrams:
        damaged = bytearray(datagram)
        for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
            damaged[index] = data.draw(st.integers(0, 255))
        found.feed(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    found.take()
    assert found.generation is None or found.generation >= 0


def test_commit_with_an_own_port_by_another_process_touches_everything() -> None:
    authors: list[CommitAuthor] = []

    def is_own_commit(author: CommitAuthor) -> bool:
        authors.append(author)
        return author.process == 0x3E06

    decoder = CommitDecoder(TABLES, lambda _: True, is_own_commit)
    for datagram in (*ELEMENTS, *OTHER):
        decoder.feed(datagram)
    assert decoder.take() is None
    for datagram in RULE:
        decoder.feed(datagram)
    everything = Touched(everything=True, by={"nft"})
    assert decoder.take() == RulesChanged({IPV4: everything, IPV6: everything})
    # The commit to another table is not confirmed: its messages would have been skipped anyway.
    assert authors == [CommitAuthor(0x3E06, 0x3E06, "nft"), CommitAuthor(0x3E05, 0x3E05, "nft")]


def test_lost_end_of_an_own_commit_does_not_concern_the_next_one() -> None:
    decoder = CommitDecoder(TABLES, lambda port: port == 0x3E05, lambda _: False)
    decoder.feed(RULE[0])
    assert not decoder.discard()
    decoder.feed(OTHER[1])
    assert decoder.take() is None
