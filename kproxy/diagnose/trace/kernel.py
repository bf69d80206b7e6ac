"""Read what a trace needs from this node's kernel: rules, addresses, routes."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from kproxy.diagnose.trace.dumps import DumpError, Dumps
from kproxy.diagnose.trace.netlink_tables import read_tables
from kproxy.host import nf_tables_constants as nf
from kproxy.host.commands import CommandError, run
from kproxy.host.interfaces import own_addresses
from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import NFGENMSG_SIZE, attribute, attributes, nfgenmsg, nfnl_type
from kproxy.host.process import has_net_admin
from kproxy.iptables.variant import FOLDER_VARIABLE, LEGACY_TABLE_FILES
from kproxy.model.types import Family
from kproxy.nftables.expressions import string_attribute

TIMEOUT_SECONDS = 60
MAX_NAMED = 3
"""Maximum number of tables that a message names."""
# linux/rtnetlink.h and linux/fib_rules.h
_RTM_GETROUTE = 26
_RTM_GETRULE = 34
_RTA_DST = 1
_RTA_OIF = 4
_RTMSG = struct.Struct("=BBBBBBBBI")
"""`struct rtmsg`; `struct fib_rule_hdr` has the same layout."""
_USUAL_RULES = {Family.IPV4: 3, Family.IPV6: 2}
"""The routing rules of every node: for the tables local, main and, in IPv4, default."""
_ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_PROGRAMS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
_RECENT = Path("/proc/thread-self/net/xt_recent")


class KernelError(Exception):
    """The kernel's state cannot be read. The message is one line."""


def read_rules(family: Family) -> Dumps:
    """Read the rules of iptables, iptables-legacy and nftables in one IP family. Raises `KernelError`."""
    if not has_net_admin():
        raise KernelError(
            "cannot read the rules of this node without root (CAP_NET_ADMIN); "
            "run as root, or pass --dump=FILE to trace through dumps of the rules"
        )
    dumps = Dumps()
    name = _PROGRAMS[family]
    try:
        for argv in _saving(name):
            dumps.add(_output(argv), argv[0], family)
        if shutil.which("nft") is not None:
            dumps.add(_output(["nft", "-j", "list", "ruleset"]), "nft", family)
        else:
            dumps.add(_tables_without_nft(family, dumps), "nf_tables", family)
    except DumpError as error:
        raise KernelError(str(error)) from None
    return dumps


def _tables_without_nft(family: Family, saved: Dumps) -> str:
    """Return the nftables that iptables-save has not saved. Raises `KernelError` if only nft can read one of them."""
    try:
        found = read_tables(family, saved.has_saved)
    except OSError as error:
        if error.errno in {errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL}:
            return ""  # a kernel without nf_tables
        raise KernelError(f"cannot read the nftables of this node: {error.strerror or error}") from None
    if not found.unreadable:
        return found.text
    names = [f"{owner} {table}" for owner, table in found.unreadable]
    if len(names) > MAX_NAMED:
        names[MAX_NAMED:] = [f"{len(names) - MAX_NAMED} more"]
    raise KernelError(
        f"nft not found, which is needed to read tables of this node ({', '.join(names)}); install package nftables, "
        "or pass --dump=FILE with the output of `nft -j list ruleset`"
    )


def _saving(name: str) -> Iterator[list[str]]:
    """Yield the commands that save the rules of iptables-nft, and those of iptables-legacy if it has tables."""
    folder = os.environ.get(FOLDER_VARIABLE)
    modern = [f"{folder}/nft/{name}-save"] if folder else []
    found = next(filter(None, map(shutil.which, (*modern, f"{name}-nft-save", f"{name}-save"))), None)
    if found:
        yield [found]
    if not _has_tables(name):
        return
    old = [f"{folder}/legacy/{name}-save"] if folder else []
    legacy = next(filter(None, map(shutil.which, (*old, f"{name}-legacy-save"))), None)
    if legacy is None:
        raise KernelError(f"{name}-legacy-save not found, but this node has rules of iptables-legacy")
    yield [legacy]


def has_legacy_tables(family: Family) -> bool:
    """Return whether this node has rules of iptables-legacy in one IP family."""
    return _has_tables(_PROGRAMS[family])


def _has_tables(name: str) -> bool:
    try:
        return bool(LEGACY_TABLE_FILES[name].read_text().split())
    except OSError:
        return False


def _output(argv: list[str]) -> str:
    try:
        done = run(argv, timeout=TIMEOUT_SECONDS)
    except CommandError as error:
        raise KernelError(str(error)) from None
    if done.code:
        raise KernelError(f"{argv[0]}: {done.error_message}")
    return done.stdout


def read_addresses(family: Family) -> frozenset[str]:
    """Return all addresses of this node in one IP family. Raises `KernelError`."""
    try:
        return own_addresses(family)
    except OSError as error:
        raise KernelError(f"cannot read the addresses of this node: {error}") from None


class Routes:
    """The routes of this node in one IP family, by destination only."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[int, str | None] = {}
        self._simple = self._has_only_usual_rules()

    def interface_to(self, address: int) -> str | None:
        """Return the interface to which packets to an address leave.

        Returns None if there is no route, or if routing rules make it depend on more than the destination.
        """
        if not self._simple:
            return None
        if address not in self._known:
            self._known[address] = self._look_up(address)
        return self._known[address]

    def missing(self) -> list[int]:
        """Return the addresses that were looked up and have no route."""
        return [address for address, interface in self._known.items() if interface is None]

    def _has_only_usual_rules(self) -> bool:
        header = _RTMSG.pack(_ADDRESS_FAMILIES[self._family], 0, 0, 0, 0, 0, 0, 0, 0)
        try:
            with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
                return sum(1 for _ in netlink.dump(_RTM_GETRULE, header)) <= _USUAL_RULES[self._family]
        except OSError:
            return False

    def _look_up(self, address: int) -> str | None:
        size = 16 if self._family is Family.IPV6 else 4
        header = _RTMSG.pack(_ADDRESS_FAMILIES[self._family], size * 8, 0, 0, 0, 0, 0, 0, 0)
        request = header + attribute(_RTA_DST, address.to_bytes(size, "big"))
        index = 0
        try:
            with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
                for data, begin, end in netlink.get(_RTM_GETROUTE, request):
                    fields = attributes(data, begin + _RTMSG.size, end)
                    if _RTA_OIF in fields:
                        index = int.from_bytes(data[slice(*fields[_RTA_OIF])], "little")
            return socket.if_indextoname(index) if index else None
        except (OSError, NetlinkError):
            return None


def forwards(family: Family) -> bool:
    """Return whether this node forwards packets at all. An unreadable setting counts as yes."""
    name = "ipv6/conf/all/forwarding" if family is Family.IPV6 else "ipv4/ip_forward"
    try:
        return Path("/proc/sys/net", name).read_text().strip() != "0"
    except OSError:
        return True


def read_recent_lists() -> dict[str, frozenset[str]]:
    """Return the addresses in each list of `-m recent`."""
    found = {}
    try:
        for path in _RECENT.iterdir():
            lines = path.read_text().splitlines()
            found[path.name] = frozenset(line.split()[0].removeprefix("src=") for line in lines if line.strip())
    except OSError:
        return found
    return found


def rule_handles(family: Family, table: str, chain: str) -> list[int]:
    """Return the handles of the rules in a chain of iptables-nft, in order. Raises `KernelError`."""
    names = string_attribute(nf.NFTA_RULE_TABLE, table) + string_attribute(nf.NFTA_RULE_CHAIN, chain)
    request = nfgenmsg(_ADDRESS_FAMILIES[family]) + names
    kind = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETRULE)

    def read() -> list[int]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            found = (
                (data, attributes(data, begin + NFGENMSG_SIZE, end)) for data, begin, end in netlink.dump(kind, request)
            )
            return [int.from_bytes(data[slice(*spans[nf.NFTA_RULE_HANDLE])], "big") for data, spans in found]

    try:
        return retry_interrupted(read)
    except OSError as error:
        raise KernelError(f"cannot read chain {chain} of table {table}: {error}") from None
