"""Constants named after kernel headers have the values of these headers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from kproxy.host import (
    ctnetlink,
    inotify,
    interfaces,
    netlink,
    netlink_message,
    nf_tables,
    nf_tables_constants,
    nfacct,
    process,
)

MODULES = (ctnetlink, inotify, interfaces, netlink, netlink_message, nf_tables, nf_tables_constants, nfacct, process)
PREFIXES = (
    *("CTA_", "IFA_", "IN_", "IPCTNL_", "NETLINK_", "NFACCT_", "NFNL_", "NFTA_", "NFT_", "NF_", "NLA_", "NLM", "RTM"),
    *("SOL_NETLINK", "SO_SNDBUFFORCE", "SO_RCVBUFFORCE"),
)
"""Prefixes of kernel constants. Every constant of `nf_tables_constants` is one, whatever its prefix."""
NOT_IN_HEADERS = ("CTA_FILTER_F_", "NFTNL_")
"""Prefixes of constants that only the kernel's sources (CTA_FILTER_F_) or libnftnl's headers (NFTNL_) define."""
HEADERS = (
    *("netinet/in.h", "sys/socket.h", "linux/netlink.h", "linux/rtnetlink.h", "linux/if_addr.h", "linux/inotify.h"),
    *("linux/netfilter.h", "linux/netfilter_ipv4.h"),
    *(
        f"linux/netfilter/{name}.h"
        for name in ("nf_conntrack_common", "nf_nat", "nf_tables", "nfnetlink", "nfnetlink_acct", "nfnetlink_conntrack")
    ),
)


def kernel_constants(module: ModuleType) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if (name.isupper() if module is nf_tables_constants else name.startswith(PREFIXES))
        and not name.startswith(NOT_IN_HEADERS)
        and isinstance(value, int)
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_constants_match_the_kernel_headers(module: ModuleType, tmp_path: Path) -> None:
    constants = kernel_constants(module)
    assert constants
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    checks = "".join(
        f'_Static_assert((long long){name} == {value}LL, "{name}");\n' for name, value in constants.items()
    )
    source = tmp_path / "constants.c"
    source.write_text(includes + checks)
    try:
        compiled = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    if "No such file or directory" in compiled.stderr:
        pytest.skip("needs the kernel headers (package linux-libc-dev)")
    assert compiled.stderr == ""
    assert compiled.returncode == 0
