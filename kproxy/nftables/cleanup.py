"""Removing the tables of nftables mode."""

from __future__ import annotations

from kproxy.host.run import CommandError, first_line, run

TIMEOUT_SECONDS = 60

_NO_SUCH_FILE = "No such file or directory"


def remove_tables() -> list[str]:
    """Delete `ip kube-proxy` and `ip6 kube-proxy` and return which of them were there.

    Without the program `nft` nothing is done. Raises `CommandError` if a table is there and stays.
    """
    removed: list[str] = []
    for family in ("ip", "ip6"):
        try:
            done = run(["nft", "delete", "table", family, "kube-proxy"], timeout=TIMEOUT_SECONDS)
        except CommandError:
            return removed
        if done.code == 0:
            removed.append(f"{family} kube-proxy")
        elif _NO_SUCH_FILE not in done.stderr:
            raise CommandError(f"nft cannot delete table {family} kube-proxy: {first_line(done.stderr)}")
    return removed
