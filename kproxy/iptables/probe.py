"""Finding out at start whether the kernel has the tables of a family, and changing nothing by that."""

from __future__ import annotations

from pathlib import Path

from kproxy.host.nft_nat import nat_refused
from kproxy.host.run import START_SECONDS, CommandError, UndecidedError, run
from kproxy.iptables.apply import LOCK_WAIT_SECONDS, IptablesVersion, program_of, restore_error
from kproxy.iptables.text import TABLES
from kproxy.model.types import Family

_LEGACY_NAMES = {
    Family.IPV4: Path("/proc/thread-self/net/ip_tables_names"),
    Family.IPV6: Path("/proc/thread-self/net/ip6_tables_names"),
}
"""What legacy tables exist in this network namespace."""

_LOCKED = 4
"""The exit status of iptables-legacy when somebody else holds its lock for all of the time it may wait."""


def check_tables(family: Family, version: IptablesVersion) -> None:
    """Raise `CommandError` if the kernel lacks a table that Services need, `UndecidedError` if that cannot be told.

    iptables-legacy is asked, in one run of a program, for those tables that do not exist yet; that creates them, as the
    first sync would. iptables-nft asks the kernel only when it has something to write, so the kernel is asked directly.
    """
    reason = _refused_by_nft(family) if version.nft else _refused_by_legacy(family, f"{program_of(family)}-restore")
    if reason:
        raise CommandError(f"the kernel lacks one of the tables {', '.join(TABLES)}: {reason}")


def _refused_by_nft(family: Family) -> str:
    try:
        return nat_refused(family)
    except OSError as error:
        raise UndecidedError(f"cannot ask the kernel for its tables of {family.value}: {error.strerror}") from None


def _refused_by_legacy(family: Family, program: str) -> str:
    existing = _names(_LEGACY_NAMES[family])
    text = "".join(f"*{table}\nCOMMIT\n" for table in TABLES if table not in existing)
    if not text:
        return ""
    done = run([program, "--test", "--noflush", "-w", str(LOCK_WAIT_SECONDS)], text, timeout=START_SECONDS)
    if done.code < 0:
        raise UndecidedError(f"{program}: {done.complaint}")
    return str(restore_error(program, done.code, done.stderr, lambda _: "")) if done.code not in {0, _LOCKED} else ""


def _names(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
