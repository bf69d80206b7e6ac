"""Privileges and OOM score of the kproxy process."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from kproxy.host.netlink import NetlinkSocket

RTM_SETLINK = 19  # linux/rtnetlink.h
_NO_INTERFACE = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
"""A `struct ifinfomsg` with interface index 0. Without the attribute IFLA_IFNAME, it does not identify an interface."""
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


def has_net_admin() -> bool:
    """Return whether this process has CAP_NET_ADMIN over its network namespace (capabilities(7)).

    The check sends a request that changes nothing, because it does not identify an interface. If the process does not
    have the capability, the kernel rejects the request with EPERM. Otherwise it rejects the request with EINVAL.

    CapEff in /proc/self/status is not sufficient. It contains all capabilities for root in a user namespace, even if
    the network namespace belongs to another user namespace. The process then has no capabilities over the network
    namespace.
    """
    try:
        with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
            netlink.request(RTM_SETLINK, 0, _NO_INTERFACE)
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def set_oom_score_adj(value: int) -> None:
    """Set the OOM score adjustment of this process, from -1000 (never killed) to 1000. Raises `OSError`.

    Lowering the value requires CAP_SYS_RESOURCE (proc(5)).
    """
    _OOM_SCORE_ADJ.write_text(str(value))
