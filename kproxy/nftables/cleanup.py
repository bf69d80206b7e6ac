"""Removing the tables of nftables mode."""

from __future__ import annotations

import errno

from kproxy.host.run import CommandError
from kproxy.model.types import Family
from kproxy.nftables.apply import NetlinkCommit, TableError
from kproxy.nftables.read import Reader
from kproxy.nftables.transaction import Transaction

_NO_NF_TABLES = {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}


def remove_table(family: Family) -> bool:
    """Delete a family's table `kube-proxy` and return whether it was there.

    Raises `CommandError` if the table is there and stays.
    """
    try:
        if not Reader(family).exists():
            return False
        NetlinkCommit(family)(Transaction(drop=True))
    except OSError as error:
        if error.errno in _NO_NF_TABLES:
            return False  # a kernel without nf_tables has no table
        raise CommandError(f"cannot look for the nftables table of {family.value}: {error.strerror}") from None
    except TableError as error:
        raise CommandError(f"cannot delete the nftables table of {family.value}: {error}") from None
    return True
