"""Named packet counters of the kernel (nfacct, linux/netfilter/nfnetlink_acct.h)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import partial

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import (
    NFGENMSG_SIZE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    attributes,
    nfgenmsg,
    nfnl_type,
)

NFNL_SUBSYS_ACCT = 7
NFNL_MSG_ACCT_NEW = 0
NFNL_MSG_ACCT_GET = 1
NFACCT_NAME = 1
NFACCT_PKTS = 2


def ensure_counters(names: Iterable[str]) -> None:
    """Create the counters that do not exist yet. Existing counters keep their counts.

    The kernel rejects a rule that refers to a counter that does not exist. Raises `OSError` if the kernel does not
    support nfacct or if this process does not have CAP_NET_ADMIN.
    """
    kind = nfnl_type(NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_NEW)
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for name in names:
            payload = nfgenmsg() + attribute(NFACCT_NAME, name.encode() + b"\0")
            try:
                netlink.request(kind, NLM_F_CREATE | NLM_F_EXCL, payload)
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise


def has_counters() -> bool:
    """Return whether `ensure_counters` would succeed, as far as this is known without creating counters."""
    try:
        retry_interrupted(partial(_dump_counter, ""))
    except OSError:
        return False
    return True


def read_counter(name: str) -> int | None:
    """Return a counter's packet count, or None if the counter does not exist or cannot be read."""
    try:
        return retry_interrupted(partial(_dump_counter, name))
    except OSError:
        return None


def _dump_counter(name: str) -> int | None:
    packets = None
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for data, begin, end in netlink.dump(nfnl_type(NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_GET), nfgenmsg()):
            counter = attributes(data, begin + NFGENMSG_SIZE, end)
            if data[slice(*counter[NFACCT_NAME])].rstrip(b"\0") == name.encode():
                packets = int.from_bytes(data[slice(*counter[NFACCT_PKTS])], "big")
    return packets
