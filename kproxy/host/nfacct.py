"""Named packet counters of the kernel (nfacct), which a rule can only name once they exist."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import NLM_F_CREATE, NLM_F_EXCL, attribute, attributes, nfgenmsg

_SUBSYSTEM = 7  # NFNL_SUBSYS_ACCT
_NEW = _SUBSYSTEM << 8  # NFNL_MSG_ACCT_NEW
_GET = _SUBSYSTEM << 8 | 1  # NFNL_MSG_ACCT_GET
_NAME = 1  # NFACCT_NAME
_PACKETS = 2  # NFACCT_PKTS
_NFGENMSG_SIZE = 4


def ensure_counters(names: Iterable[str]) -> None:
    """Create the counters that do not exist yet; those that do keep their counts.

    Raises `OSError` where the kernel has no nfacct or this process may not use it.
    """
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for name in names:
            try:
                netlink.request(_NEW, NLM_F_CREATE | NLM_F_EXCL, nfgenmsg() + attribute(_NAME, name.encode() + b"\0"))
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise


def read_counter(name: str) -> int | None:
    """Return how many packets a counter has seen, None where there is no such counter or no way to read it."""
    found = None
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(_GET, nfgenmsg()):
                places = attributes(data, begin + _NFGENMSG_SIZE, end)
                if data[slice(*places[_NAME])].rstrip(b"\0") == name.encode():
                    found = int.from_bytes(data[slice(*places[_PACKETS])], "big")
    except OSError:
        return None
    return found
