"""The objects that netlink or nft reject are found in their replies."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from kproxy.host.netlink import BatchRejectedError, BatchSocket, RejectedMessage
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.elements import SetElement, endpoint_elements, pack_address, pack_endpoints, service_key
from kproxy.nftables.encode import TransactionEncoder, rejected_element, split_elements
from kproxy.nftables.kernel import NetlinkCommit, TableError, TransactionRejectedError
from kproxy.nftables.nft_errors import NftErrors
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.rejection import RejectedObject
from kproxy.nftables.ruleset import Goto, KeyField, NftChain, NftSet, rule
from kproxy.nftables.transaction import Transaction

IPV4 = Family.IPV4
KEY = [service_key(f"10.96.0.{number}", "TCP", 80) for number in range(4)]
NO_FILE = "Could not process rule: No such file or directory"


def transaction() -> Transaction:
    """Return a transaction with all kinds of objects."""
    chain = NftChain("firewall-A", (rule(Goto("none")),), "ns/a")
    change = Transaction(
        deleted_elements={names.SERVICE_IPS: [SetElement(KEY[0], "a", "ns/a"), SetElement(KEY[1], "a", "ns/b")]},
        flushed_chains=["service-any-1"],
        deleted_sets=["affinity-B"],
        deleted_chains=["firewall-B"],
        added_sets=[NftSet("affinity-A", (KeyField.SOURCE,), timeout=60)],
        added_chains=[chain],
        added_rules=[chain],
    )
    values = pack_endpoints(["10.244.0.1:80", "10.244.0.2:80"])
    change.added_endpoints[names.SERVICE_ENDPOINTS] = list(endpoint_elements(KEY[2], values, 8))
    change.add_element(names.CLUSTER_IPS, SetElement(pack_address("10.96.0.2")))
    change.add_element(names.SERVICE_IPS, SetElement(KEY[2], "firewall-A", "ns/a"))
    change.add_element(names.SERVICE_IPS, SetElement(KEY[3], "firewall-A", "ns/c"))
    return change


def location(marked: str) -> str:
    """Return the line and the columns of the text between brackets in a command of the transaction."""
    begin, end = marked.index("["), marked.index("]")
    lines = NftWriter(IPV4).commands(transaction()).splitlines()
    return f"{lines.index(marked.replace('[', '').replace(']', '')) + 1}:{begin + 1}-{end - 1}"


LOCATED = {
    "delete element ip kube-proxy service-ips { 10.96.0.0 . tcp . 80, [10.96.0.1 . tcp . 80] }": RejectedObject(
        "element", names.SERVICE_IPS, "element 10.96.0.1 . tcp . 80 of service-ips of ns/b: ", KEY[1]
    ),
    "flush chain ip kube-proxy [service-any-1]": RejectedObject("chain", "service-any-1", "chain service-any-1: "),
    "delete set ip kube-proxy [affinity-B]": RejectedObject("set", "affinity-B", "set affinity-B: "),
    "delete chain ip kube-proxy [firewall-B]": RejectedObject("chain", "firewall-B", "chain firewall-B: "),
    "delete chain ip [kube-proxy] firewall-B": RejectedObject("table", names.TABLE, "table kube-proxy: "),
    'add chain ip kube-proxy [firewall-A] { comment "ns/a" ; }': RejectedObject(
        "chain", "firewall-A", "chain firewall-A: "
    ),
    "add rule ip kube-proxy firewall-A goto [none]": RejectedObject(
        "chain", "firewall-A", "a rule of chain firewall-A: "
    ),
    "add element ip kube-proxy service-endpoints "
    "{ 10.96.0.2 . tcp . 80 . 0 : 10.244.0.1 . 80, [10.96.0.2 . tcp . 80 . 1] : 10.244.0.2 . 80 }": RejectedObject(
        "element",
        names.SERVICE_ENDPOINTS,
        "element 10.96.0.2 . tcp . 80 . 1 of service-endpoints: ",
        KEY[2] + b"\1\0\0\0",
    ),
    "add element ip kube-proxy [cluster-ips] { 10.96.0.2 }": RejectedObject(
        "set", names.CLUSTER_IPS, "set cluster-ips: "
    ),
    'add element ip kube-proxy service-ips { 10.96.0.2 . tcp . 80 comment "ns/a" : goto firewall-A, '
    '[10.96.0.3 . tcp . 80 comment "ns/c"] : goto firewall-A }': (
        RejectedObject("element", names.SERVICE_IPS, "element 10.96.0.3 . tcp . 80 of service-ips of ns/c: ", KEY[3])
    ),
}
"""What the error is about, by the place that nft names in the input, in brackets."""


@pytest.mark.parametrize("marked", LOCATED)
def test_nft_names_objects_by_line_and_column(marked: str) -> None:
    expected = LOCATED[marked]
    errors = f"/dev/stdin:{location(marked)}: Error: {NO_FILE}\nadd something\n    ^^^\n"
    (found,) = NftErrors(NftWriter(IPV4), transaction()).objects(errors)
    assert found.reason == expected.reason + NO_FILE
    assert (found.kind, found.name, found.key, found.code) == (
        expected.kind,
        expected.name,
        expected.key,
        errno.ENOENT,
    )


@pytest.mark.parametrize(
    "errors", ["", "Segmentation fault\n", "internal:0:0-0: Error: no\n", "/dev/stdin:999:1-2: Error: no\n"]
)
def test_nft_error_without_a_known_place_names_nothing(errors: str) -> None:
    assert NftErrors(NftWriter(IPV4), transaction()).objects(errors) == ()


def test_elements_are_split_into_messages_of_their_own() -> None:
    for message in TransactionEncoder(IPV4).encode(transaction()):
        if not message.elements:
            continue
        found = []
        for each in split_elements(message):
            (element,) = each.elements
            assert rejected_element(each, each.elements_offset) == element
            assert rejected_element(each, len(each.payload)) is None
            found.append(element)
        whole = [rejected_element(message, offset) for offset in range(message.elements_offset, len(message.payload))]
        assert list(dict.fromkeys(whole)) == found


class ScriptedSocket(BatchSocket):
    """Rejects batches with scripted rejections, and records how many messages each has."""

    def __init__(self, *rejections: Sequence[RejectedMessage]) -> None:
        self.rejections = list(rejections)
        self.sizes: list[int] = []

    def commit(self, messages: Sequence[tuple[int, int, bytes]], generation: int | None = None) -> None:
        self.sizes.append(len(messages))
        if self.rejections:
            raise BatchRejectedError(self.rejections.pop(0))


def rejected(*rejections: Sequence[RejectedMessage]) -> tuple[ScriptedSocket, TableError | None]:
    """Commit the transaction. The kernel rejects it with these rejections, one list at each attempt."""
    commit, scripted = NetlinkCommit(IPV4), ScriptedSocket(*rejections)
    commit._socket = scripted
    try:
        commit(transaction())
    except TableError as error:
        return scripted, error
    return scripted, None


def test_rejected_element_is_tried_again_with_single_elements() -> None:
    messages = list(TransactionEncoder(IPV4).encode(transaction()))
    last = len(messages) - 1
    scripted, error = rejected(
        [RejectedMessage(last, errno.EINVAL, "Invalid argument", messages[last].elements_offset)],
        # Without offsets, as from old kernels.
        [RejectedMessage(index, errno.EINVAL, "Invalid argument") for index in (last, last + 1)],
    )
    assert scripted.sizes == [len(messages), len(messages) + 1]
    assert isinstance(error, TransactionRejectedError)
    assert [(each.kind, each.key) for each in error.objects] == [("element", KEY[2]), ("element", KEY[3])]


def test_batch_that_the_kernel_accepts_at_the_second_attempt_is_committed() -> None:
    _, error = rejected([RejectedMessage(0, errno.EINVAL, "Invalid argument", 100)])
    assert error is None


@pytest.mark.parametrize(
    "rejection",
    [
        RejectedMessage(-1, errno.EINVAL, "Invalid argument"),
        RejectedMessage(0, errno.EPERM, "Operation not permitted"),
        RejectedMessage(0, errno.ENOMEM, "Cannot allocate memory", 100),
    ],
)
def test_failure_that_hits_everything_is_not_a_rejection_of_objects(rejection: RejectedMessage) -> None:
    scripted, error = rejected([rejection])
    assert error is not None
    assert not isinstance(error, TransactionRejectedError)
    assert len(scripted.sizes) == 1


def test_missing_table_is_a_rejection_of_the_table() -> None:
    scripted, error = rejected([RejectedMessage(0, errno.ENOENT, "No such file or directory", 4)])
    assert isinstance(error, TransactionRejectedError)
    assert [each.kind for each in error.objects] == ["table"]
    assert len(scripted.sizes) == 1
