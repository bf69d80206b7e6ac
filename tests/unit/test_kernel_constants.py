"""Constants that are named after kernel headers have the values in these headers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from kproxy.host import conntrack, inotify, interfaces, netlink, netlink_message, nf_tables, nfacct, process

MODULES = (conntrack, inotify, interfaces, netlink, netlink_message, nf_tables, nfacct, process)
PREFIXES = (
    *("CTA_", "IFA_", "IN_", "IPCTNL_", "NETLINK_", "NFACCT_", "NFNL_", "NFTA_", "NFT_", "NF_", "NLA_", "NLM", "RTM"),
    *("SOL_NETLINK", "SO_SNDBUFFORCE"),
)
NOT_IN_HEADERS = ("CTA_FILTER_F_",)
"""Prefixes of kernel constants that the user-space headers do not define."""
HEADERS = (
    *("sys/socket.h", "linux/netlink.h", "linux/rtnetlink.h", "linux/if_addr.h", "linux/inotify.h"),
    *("linux/netfilter.h", "linux/netfilter_ipv4.h"),
    *(f"linux/netfilter/{name}.h" for name in ("nfnetlink", "nfnetlink_acct", "nfnetlink_conntrack", "nf_tables")),
)


def constants(module: ModuleType) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith(PREFIXES) and not name.startswith(NOT_IN_HEADERS) and isinstance(value, int)
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_constants_match_the_kernel_headers(module: ModuleType, tmp_path: Path) -> None:
    expected = constants(module)
    assert expected
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    prints = "".join(f'printf("%d\\n", (int){name});\n' for name in expected)
    source = tmp_path / "constants.c"
    source.write_text(f"#include <stdio.h>\n{includes}int main(void) {{\n{prints}return 0;\n}}\n")
    try:
        subprocess.run(["cc", "-o", tmp_path / "constants", source], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    except subprocess.CalledProcessError as error:
        if "No such file or directory" in error.stderr:
            pytest.skip("no kernel headers (package linux-libc-dev)")
        raise AssertionError(error.stderr) from None
    completed = subprocess.run([tmp_path / "constants"], check=True, capture_output=True, text=True)
    assert dict(zip(expected, map(int, completed.stdout.split()), strict=True)) == expected
