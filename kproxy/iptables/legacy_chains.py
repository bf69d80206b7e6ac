"""`python -m kproxy.iptables.legacy_chains`: list the KUBE- chains in table nat of iptables-legacy.

This is a separate program because python-iptables adds 12 MB to the memory of a process, and because the C libraries
that it loads may call `exit()`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Print one line for each chain: `iptables` or `ip6tables`, a space, and the chain's name."""
    import iptc  # noqa: PLC0415 - fails if the iptables libraries are not installed

    for program, table in (("iptables", iptc.Table(iptc.Table.NAT)), ("ip6tables", iptc.Table6(iptc.Table6.NAT))):
        for chain in table.chains:
            if chain.name.startswith("KUBE-"):
                sys.stdout.write(f"{program} {chain.name}\n")


if __name__ == "__main__":
    main()
