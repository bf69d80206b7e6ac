"""The Services that the kernel rejects do not keep the others from being programmed, in iptables mode."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kproxy.iptables.ledger import record_chains
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName
from kproxy.model.sync_report import SyncError
from kproxy.model.types import EndpointSlice, Service
from tests.fakekernel import FakeKernel
from tests.unit.test_iptables_diff import IptablesProxy, a_slice, service

NAMES = "abcdefghijklmnop"
RANGES = {"vips": ("203.0.113.1",), "source_ranges": ("198.51.100.0/24",)}


def objects(name: str, *lasts: int, **more: object) -> list[Service | EndpointSlice]:
    return [service(name, **more), a_slice(*lasts, owner=name)]


def poison(kernel: FakeKernel, names: Iterable[str], table: str = "", text: str = "") -> None:
    """Make the kernel reject each rule of these Services that is in `table`, if given, and contains `text`."""
    comments = [f'"ns/{name}:http' for name in names]

    def reject(where: str, line: str) -> str | None:
        named = where.startswith(table) and text in line and any(comment in line for comment in comments)
        return "RULE_APPEND failed (No such file or directory)" if named else None

    kernel.reject_line = reject


def fresh(*objects: Service | EndpointSlice, limit: int = 600, threshold: int = 1000) -> list[str]:
    proxy = IptablesProxy(max_transaction_rules=limit, dispatch_threshold=threshold)
    proxy.sync(*objects)
    return proxy.kernel.dump()


def rejected(proxy: IptablesProxy) -> set[str]:
    return {key.removeprefix("ns/") for key in proxy.result.applied.rejected}


@pytest.mark.parametrize("names_lines", [True, False])
@pytest.mark.parametrize("limit", [20, 600, 1 << 60])
@pytest.mark.parametrize("poisoned", ["c", "aop", NAMES])
def test_at_start_all_other_services_are_programmed_in_the_same_sync(
    names_lines: bool, limit: int, poisoned: str
) -> None:
    kernel = FakeKernel()
    kernel.names_lines = names_lines
    poison(kernel, poisoned)
    proxy = IptablesProxy(kernel, max_transaction_rules=limit)
    proxy.sync(*(item for name in NAMES for item in objects(name, 1, 2)))
    assert rejected(proxy) == set(poisoned)
    good = (item for name in NAMES if name not in poisoned for item in objects(name, 1, 2))
    assert kernel.dump() == fresh(*good, limit=limit)


def test_reason_names_the_rule_and_the_message_of_the_kernel() -> None:
    proxy = IptablesProxy()
    poison(proxy.kernel, "a", text="--probability")
    proxy.sync(*objects("a", 1, 2), *objects("b", 3))
    (reason,) = proxy.result.applied.rejected.values()
    assert "RULE_APPEND failed (No such file or directory)" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("names_lines", [True, False])
def test_rejected_service_keeps_its_rules_while_the_others_change(names_lines: bool) -> None:
    proxy = IptablesProxy()
    proxy.kernel.names_lines = names_lines
    proxy.sync(*(item for name in NAMES for item in objects(name, 1, 2)))
    poison(proxy.kernel, "c")
    proxy.sync(*(item for name in NAMES for item in objects(name, 3)))
    assert rejected(proxy) == {"c"}
    expected = fresh(*objects("c", 1, 2), *(item for name in NAMES if name != "c" for item in objects(name, 3)))
    assert proxy.kernel.dump() == expected
    proxy.forget()  # nor does a full check remove them
    proxy.sync()
    assert rejected(proxy) == {"c"}
    assert proxy.kernel.dump() == expected


def test_retry_of_a_rejected_service_is_one_small_input_without_a_read() -> None:
    proxy = IptablesProxy()
    proxy.sync(*(item for name in NAMES for item in objects(name, 1, 2)))
    poison(proxy.kernel, "c")
    proxy.sync(*objects("c", 3), *objects("d", 3))
    reads, before = proxy.kernel.reads, proxy.kernel.dump()
    proxy.kernel.inputs.clear()
    proxy.sync(*objects("c", 4), *objects("e", 4))
    assert rejected(proxy) == {"c"}
    assert proxy.kernel.reads == reads
    others, retry, *rest = proxy.kernel.inputs
    assert '"ns/c' not in others
    assert retry.count("\n-A ") < 8
    assert all("KUBE-PROXY-CANARY" in text for text in rest)
    proxy.sync(*objects("e", 1, 2))
    assert proxy.kernel.dump() == before


def test_accepted_retry_leaves_the_rules_of_a_fresh_start() -> None:
    proxy = IptablesProxy()
    proxy.sync(*objects("a", 1, 2), *objects("b", 1))
    poison(proxy.kernel, "a")
    proxy.sync(*objects("a", 3, 4))
    poison(proxy.kernel, "")
    proxy.sync(*objects("a", 5))
    assert rejected(proxy) == set()
    assert proxy.kernel.dump() == fresh(*objects("a", 5), *objects("b", 1))


def test_deleted_service_leaves_nothing_behind() -> None:
    proxy = IptablesProxy()
    proxy.sync(*objects("a", 1, 2), *objects("b", 1))
    poison(proxy.kernel, "a")
    proxy.sync(*objects("a", 3, 4))
    proxy.delete(Service, "a").sync()
    assert rejected(proxy) == set()
    assert proxy.kernel.dump() == fresh(*objects("b", 1))


def test_problem_that_hits_everything_quarantines_nothing() -> None:
    proxy = IptablesProxy()
    proxy.sync(*objects("a", 1, 2), *objects("b", 1))
    proxy.kernel.reject = lambda _: "Permission denied (you must be root)"
    with pytest.raises(SyncError, match="Permission denied"):
        proxy.sync(*objects("a", 3), *objects("b", 3))
    proxy.kernel.reject = lambda _: None
    proxy.sync()
    assert proxy.kernel.dump() == fresh(*objects("a", 3), *objects("b", 3))


def test_rejected_base_rule_quarantines_nothing() -> None:
    proxy = IptablesProxy()
    proxy.kernel.reject_line = lambda _, line: "no such target" if "MASQUERADE" in line else None
    with pytest.raises(SyncError, match="no such target"):
        proxy.sync(*objects("a", 1, 2))


def test_input_that_is_rejected_once_is_repeated() -> None:
    proxy = IptablesProxy()
    proxy.sync(*objects("a", 1, 2))
    answers = iter(["Resource temporarily unavailable"])
    proxy.kernel.reject = lambda _: next(answers, None)
    proxy.sync(*objects("a", 3))
    assert rejected(proxy) == set()
    assert proxy.kernel.dump() == fresh(*objects("a", 3))


@pytest.mark.parametrize("chain", ["KUBE-MARK-MASQ", "KUBE-SERVICES", "KUBE-SVC", "KUBE-SEP"])
def test_chain_that_another_process_deleted_is_restored_in_the_same_sync(chain: str) -> None:
    """The kernel rejects new rules that jump to the chain, but no Service is to blame."""
    proxy = IptablesProxy()
    proxy.sync(*objects("a", 1, 2), *objects("b", 1))
    nat = proxy.kernel.tables["nat"]
    for name in [name for name in nat if name.startswith(chain)]:
        del nat[name]
    for name, rules in nat.items():
        nat[name] = [rule for rule in rules if f"-j {chain}" not in rule]
    proxy.sync(*objects("a", 1, 2, 3), *objects("b", 1, 2), *objects("c", 1))
    assert rejected(proxy) == set()
    if chain != "KUBE-SERVICES":  # this sync rewrites it anyway
        assert proxy.kernel.dump() == fresh(*objects("a", 1, 2, 3), *objects("b", 1, 2), *objects("c", 1))


def with_endpoints(name: str, lasts: Collection[int], more: bool) -> list[Service | EndpointSlice]:
    return objects(name, *lasts, **(RANGES if more else {}))


def assert_ledger_matches_kernel(proxy: IptablesProxy) -> None:
    ledger = proxy.backend._ledger  # type: ignore[attr-defined]
    recorded: dict[ChainName, int] = dict(ledger.base)
    for record in ledger.services.values():
        recorded |= {ChainName("nat", name): digest for name, digest in record_chains(record)}
    for record in ledger.dispatch.values():
        recorded |= record.chains
    existing = {
        ChainName(table, name): hash("\n".join(f"-A {name} {rule}" for rule in rules))
        for table, chains in proxy.kernel.tables.items()
        for name, rules in chains.items()
        if name.startswith("KUBE-") and ChainName(table, name) not in (*CANARIES, FILTER_FIREWALL)
    }
    assert {chain: ledger.existing(chain, digest) for chain, digest in recorded.items()} == existing


STATES = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.lists(st.integers(1, 4), unique=True, max_size=3), st.booleans())
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(STATES, min_size=1, max_size=5),
    st.lists(st.tuples(st.sets(st.sampled_from("abcde"), max_size=2), st.sampled_from(("", "nat", "filter")))),
    st.sampled_from((2, 12, 600)),
    st.sampled_from((1, 3, 1000)),
    st.sampled_from([(names, text) for names in (True, False) for text in ("", "-j DNAT", "-j DROP")]),
)
@example(
    [{"a": ([], False), "b": ([1], False)}, {"a": ([], False), "b": ([1, 2], True)}, {}],
    [(set(), ""), ({"b"}, "filter"), ({"b"}, "")],
    2,
    1,
    (True, ""),
)
@example([{"a": ([1], False)}, {"a": ([1], True), "b": ([1], False)}], [(set(), ""), ({"a"}, "")], 2, 1, (True, ""))
def test_after_the_cure_any_history_leaves_the_rules_of_a_fresh_start(
    history: list[dict[str, tuple[list[int], bool]]],
    faults: list[tuple[set[str], str]],
    limit: int,
    threshold: int,
    fault: tuple[bool, str],
) -> None:
    proxy = IptablesProxy(max_transaction_rules=limit, dispatch_threshold=threshold)
    proxy.kernel.names_lines, text = fault
    final: dict[str, tuple[list[int], bool]] = {}
    for index, state in enumerate(history):
        names, table = faults[index] if index < len(faults) else (set[str](), "")
        poison(proxy.kernel, names, table, text)
        final |= state
        proxy.sync(*(item for name, (lasts, more) in state.items() for item in with_endpoints(name, lasts, more)))
        assert rejected(proxy) <= names
        assert_ledger_matches_kernel(proxy)
        if index % 2:
            proxy.forget()
    poison(proxy.kernel, "")
    proxy.sync(*(item for name, (lasts, more) in final.items() for item in with_endpoints(name, lasts, more)))
    # Rejected Services are due only after a while. Until then, they are tried again only if they change.
    if rejected(proxy) or proxy.families[proxy.context.family].next_retry is not None:
        proxy.results[proxy.context.family] = proxy.families[proxy.context.family].sync(proxy.store, 1e9)
    assert rejected(proxy) == set()
    expected = (item for name, (lasts, more) in final.items() for item in with_endpoints(name, lasts, more))
    assert proxy.kernel.dump() == fresh(*expected, limit=limit, threshold=threshold)
    proxy.kernel.inputs.clear()
    proxy.sync()
    assert proxy.kernel.inputs == []
