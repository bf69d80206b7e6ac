"""What the kernel allows this process to do."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from kproxy.host.netlink import NetlinkSocket

_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


def set_oom_score_adj(value: int) -> None:
    """Set how readily the kernel ends this process when memory runs out, -1000 (never) to 1000. Raises `OSError`.

    Lowering it takes CAP_SYS_RESOURCE (proc(5)).
    """
    _OOM_SCORE_ADJ.write_text(str(value))


_RTM_SETLINK = 19
_NO_LINK = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
"""A `struct ifinfomsg` without an index. No name follows either, so the request is about no link at all."""


def has_net_admin() -> bool:
    """Return whether this process has CAP_NET_ADMIN over its network namespace (capabilities(7)).

    The kernel is asked by a request that changes nothing: it refuses it for lack of the capability (EPERM) before it
    sees that no link is named (EINVAL). Unlike `CapEff` of /proc/self/status, the answer is also right in a user
    namespace, whose root has all capabilities there and none over a network namespace from outside.
    """
    try:
        with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
            netlink.request(_RTM_SETLINK, 0, _NO_LINK)
    except OSError as error:
        return error.errno != errno.EPERM
    return True
