"""Removing the tables of nftables mode."""

from __future__ import annotations

from kproxy.host.run import CommandError, first_line, run
from kproxy.model.types import Family

TIMEOUT_SECONDS = 60

_NO_SUCH_FILE = "No such file or directory"


def remove_table(family: Family) -> bool:
    """Delete a family's table `kube-proxy` and return whether it was there.

    Without the program `nft` nothing is done. Raises `CommandError` if the table is there and stays.
    """
    table = ["ip6" if family is Family.IPV6 else "ip", "kube-proxy"]
    try:
        done = run(["nft", "delete", "table", *table], timeout=TIMEOUT_SECONDS)
    except CommandError:
        return False
    if done.code and _NO_SUCH_FILE not in done.stderr:
        raise CommandError(f"nft cannot delete table {' '.join(table)}: {first_line(done.stderr)}")
    return not done.code
