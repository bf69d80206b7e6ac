"""The nf_tables constants have the values of the kernel's headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kproxy.host import nf_tables_constants

HEADERS = (
    "netinet/in.h",
    "linux/netfilter.h",
    "linux/netfilter/nfnetlink.h",
    "linux/netfilter/nf_tables.h",
    "linux/netfilter/nf_nat.h",
    "linux/netfilter/nf_conntrack_common.h",
    "linux/rtnetlink.h",
)


def test_constants_have_the_values_of_the_kernel_headers(tmp_path: Path) -> None:
    if not shutil.which("cc") or not Path("/usr/include/linux/netfilter/nf_tables.h").exists():
        pytest.skip("needs a C compiler and the kernel headers (linux-libc-dev)")
    constants = {
        name: value
        for name, value in vars(nf_tables_constants).items()
        if name.isupper() and not name.startswith("NFTNL_")  # libnftnl's own header is rarely installed
    }
    assert constants
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    checks = "".join(
        f'_Static_assert((long long){name} == {value}LL, "{name}");\n' for name, value in constants.items()
    )
    source = tmp_path / "constants.c"
    source.write_text(includes + checks)
    compiled = subprocess.run(["cc", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False)
    assert compiled.stderr == ""
    assert compiled.returncode == 0
