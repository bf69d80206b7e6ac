"""`python -m kproxy.iptables.legacy_chains`: print the KUBE- chains of table nat that iptables-legacy has, one a line.

A program of its own because python-iptables adds 12 MB to a process, and its C libraries may end it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Print `iptables` or `ip6tables` and a chain's name, for each chain."""
    import iptc  # noqa: PLC0415 - fails where the libraries of iptables are not installed

    for program, table in (("iptables", iptc.Table(iptc.Table.NAT)), ("ip6tables", iptc.Table6(iptc.Table6.NAT))):
        for chain in table.chains:
            if chain.name.startswith("KUBE-"):
                sys.stdout.write(f"{program} {chain.name}\n")


if __name__ == "__main__":
    main()
