"""Talking to the kernel through `iptables-restore` and `iptables-save`."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import deque
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from msgspec import Struct

from kproxy.host.commands import (
    PROBE_TIMEOUT_SECONDS,
    CommandError,
    CommandRunner,
    CompletedCommand,
    InconclusiveError,
    first_line,
    run,
)
from kproxy.host.netlink import retry_interrupted
from kproxy.host.nf_tables import count_rules, nat_unsupported_reason
from kproxy.iptables.names import ChainName
from kproxy.iptables.save_restore import TABLES, incompatible_line, parse_rules, parse_save
from kproxy.model.types import Family

LOCK_WAIT_SECONDS = 5
"""How long one attempt waits for the xtables lock, which iptables-legacy takes for every change."""
HANG_SECONDS = 900
"""How long an iptables program may take for one transaction or question; the longest honest run known took 150 s."""
_NO = 1
"""The exit status that says no: there is no such chain or rule, or a chain of that name is there already."""
_NOT_UNDERSTOOD = 2
"""The exit status for a rule that cannot be, such as one that jumps to a chain that is not there."""
_UNREADABLE = 3
"""The exit status of iptables-nft at a rule that nft made and iptables has no words for; what came before is printed.

Of some such rules it says for the whole chain, or table, that it is incompatible.
"""


HIDDEN = "# a rule that only nft can show"
"""What a look at a chain ends with when it ended early: no rule of ours is like it."""
_MOST_RULES_APART = 1000
"""How many rules of a chain are asked for one by one at most: each takes 3 ms."""


class RestoreError(Exception):
    """The kernel did not accept a change of a table: nothing of it is in force, nor of the tables after it.

    `line` is the offending line of the input where iptables could tell, else "".
    """

    def __init__(self, message: str, *, line: str = "") -> None:
        super().__init__(message)
        self.line = line


class IptablesVersion(Struct, frozen=True):
    """What `iptables --version` says: its version, and whether it speaks to nf_tables or to x_tables."""

    number: tuple[int, ...]
    nft: bool

    @property
    def random_fully(self) -> bool:
        """Whether MASQUERADE knows `--random-fully` (since 1.6.2)."""
        return self.number >= (1, 6, 2)

    @property
    def finds_single_rules(self) -> bool:
        """Whether to edit a chain it reads that chain alone (iptables-nft since 1.8.5): others read whole tables."""
        return self.nft and self.number >= (1, 8, 5)

    def __str__(self) -> str:
        number = ".".join(map(str, self.number))
        return f"iptables {number} ({'nf_tables' if self.nft else 'legacy'})"


def parse_version(text: str) -> IptablesVersion:
    """Read `iptables v1.8.9 (nf_tables)`. Before 1.8 there was no nf_tables and no mention of it."""
    found = re.search(r"v(\d+(?:\.\d+)*)", text)
    if found is None:
        raise CommandError(f"cannot tell the version of iptables from {first_line(text)!r}")
    return IptablesVersion(tuple(int(part) for part in found[1].split(".")), nft="nf_tables" in text)


def program_of(family: Family) -> str:
    """Return the name of a family's iptables, which is also what those of `-save` and `-restore` begin with."""
    return "ip6tables" if family is Family.IPV6 else "iptables"


class IptablesRunner:
    """The iptables programs of one family, as found in PATH."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._prefix = program_of(family)
        self._programs = CommandRunner()
        self._version: IptablesVersion | None = None

    def stop(self) -> None:
        """End what is under way, from another thread, and do nothing any more.

        A transaction is in force as a whole or not at all; and once this returns it does not come into force later,
        when a successor may already have looked at the kernel.
        """
        self._programs.stop()

    def version(self) -> IptablesVersion:
        """Return the version of the installed iptables, which is asked for once. Raises `CommandError`."""
        if self._version is None:
            self._version = self._ask_version()
        return self._version

    def _ask_version(self) -> IptablesVersion:
        done = self._programs.run([self._prefix, "--version"], timeout=PROBE_TIMEOUT_SECONDS)
        if done.code:
            error = InconclusiveError if done.code < 0 else CommandError
            raise error(f"{self._prefix} --version failed: {done.error_message}")
        return parse_version(done.stdout)

    @contextmanager
    def save(self) -> Iterator[Iterator[str]]:
        """Return the rules of all tables as lines of text for `read_save`, read as they come. Raises `CommandError`.

        One rule that iptables-nft cannot print ends its dump. Then it is asked for each table, so that one that it
        cannot print does not hide the others; not at once, for that takes it as long each time as all tables do.
        """
        with closing(self._dump()) as lines:
            yield lines

    def _dump(self) -> Generator[str, None, None]:
        if (yield from self._try([f"{self._prefix}-save"])):
            for table in TABLES:
                if complaint := (yield from self._try([f"{self._prefix}-save", "-t", table])):
                    yield incompatible_line(table, complaint)

    def _try(self, argv: Sequence[str]) -> Generator[str, None, str]:
        """Yield what a program prints and return why it failed, or "". Raises `CommandError` if it never ran.

        iptables-legacy fails for other reasons than a single rule, so then that is raised, too.
        """
        nft = self.version().nft
        began = False
        try:
            with self._programs.stream_output(argv, timeout=HANG_SECONDS) as lines:
                began = True
                yield from lines
        except CommandError as error:
            if not (nft and began):
                raise
            return str(error)
        return ""

    def restore(self, text: str) -> None:
        """Make the changes that `text` holds, one transaction per table. Raises `RestoreError`.

        Chains that `text` does not name are left alone.
        """
        self.restore_each([text])

    def restore_each(self, texts: Iterable[str]) -> None:
        """Make changes as `restore` does, one after the other, while the next texts are being made.

        After one that is not accepted, no more are made. One program makes them all: it carries a table's changes out
        as soon as it has read them, and starting one for each text takes a tenth of the time.
        """
        argv = [f"{self._prefix}-restore", "--noflush", "-w", str(LOCK_WAIT_SECONDS)]
        remaining = iter(texts)
        first = next(remaining, None)
        if first is None:
            return
        recent = RecentInput()
        done = self._programs.stream_input(argv, recent.of(itertools.chain([first], remaining)), timeout=HANG_SECONDS)
        if done.code:
            raise restore_error(argv[0], done.code, done.stderr, recent.line)

    def has(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, given without `-A CHAIN`.

        None says that it cannot be told: rules that iptables cannot read are in the way. Raises `CommandError`.
        """
        code = self._command(chain, "-C", rule, also=(_NO, _NOT_UNDERSTOOD, _UNREADABLE)).code
        return self._finds(chain, f"-A {chain.name} {rule}") if code == _UNREADABLE else code == 0

    def _finds(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, asking for one rule at a time to get past those that cannot be read."""
        for number in range(1, _MOST_RULES_APART + 1):
            done = self._command(chain, "-S", str(number), also=(_NO, _UNREADABLE))
            if done.code == _NO:
                return None
            listed = parse_rules(done.stdout)
            if rule in listed:
                return True
            if done.code == 0 and not listed:
                return False
        return None

    def look(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of some chains in the spelling of `read_save`, without chains that do not exist.

        A rule that iptables cannot read hides those after it, for which `HIDDEN` stands, or the whole chain.
        Raises `CommandError`.
        """
        if self.version().nft:
            return {chain: rules for chain in chains if (rules := self._list(chain)) is not None}
        found: dict[ChainName, list[str]] = {}
        names: dict[str, list[str]] = {}
        for chain in chains:
            names.setdefault(chain.table, []).append(chain.name)
        for table, wanted in names.items():
            # Whatever iptables-legacy is asked, it fetches a whole table: one look at each serves for all chains.
            needed = ("*", *(f":{name} " for name in wanted), *(f"-A {name} " for name in wanted))
            with self._programs.stream_output([f"{self._prefix}-save", "-t", table], timeout=HANG_SECONDS) as lines:
                saved = parse_save(line for line in lines if line.startswith(needed))
            found |= {chain: content.rules for chain, content in saved.items()}
        return found

    def _list(self, chain: ChainName) -> list[str] | None:
        done = self._command(chain, "-S", also=(_NO, _UNREADABLE))
        if done.code == _NO:
            return None
        return parse_rules(done.stdout) + [HIDDEN] * (done.code == _UNREADABLE)

    def lengths(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        """Return how many rules each chain has, 0 without it; nothing where that cannot be told. For iptables-nft."""
        found: dict[ChainName, int] = {}
        for chain in chains:
            with suppress(OSError):
                found[chain] = retry_interrupted(partial(count_rules, self._family, chain.table, chain.name))
        return found

    def create(self, chain: ChainName) -> None:
        """Create a chain unless it exists; its rules stay. Raises `CommandError`."""
        self._command(chain, "-N", also=(_NO,))

    def _command(self, chain: ChainName, command: str, rule: str = "", *, also: Container[int]) -> CompletedCommand:
        """Run a command that ends with status 0, or one of those `also`: any other is a failure, and no answer."""
        argv = [self._prefix, "-w", str(LOCK_WAIT_SECONDS), "-t", chain.table, command, chain.name, *shlex.split(rule)]
        done = self._programs.run(argv, timeout=HANG_SECONDS)
        if done.code and done.code not in also:
            raise CommandError(f"{self._prefix} failed with status {done.code}: {first_line(done.stderr)}")
        return done


_AHEAD = (1 << 20) + (1 << 16)
"""More than a pipe holds (64 KiB, or 1 MiB where pages are large, pipe(7)) and a program reads at once.

What came so far before the end of its input, it has done with.
"""


class RecentInput:
    """The end of a long input: what a program may not have read yet, so that its complaints can be looked up."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque()
        self._size = 0
        self._dropped_lines = 0

    def of(self, texts: Iterable[str]) -> Iterator[str]:
        """Hand on texts, whole lines each, and remember them."""
        for text in texts:
            while self._kept and self._size - len(self._kept[0]) > _AHEAD:
                self._size -= len(self._kept[0])
                self._dropped_lines += self._kept.popleft().count("\n")
            self._kept.append(text)
            self._size += len(text)
            yield text

    def line(self, number: int) -> str:
        """Return a line by its number, from 1, "" if it is not remembered."""
        lines = "".join(self._kept).splitlines()
        place = number - 1 - self._dropped_lines
        return lines[place] if 0 <= place < len(lines) else ""


_LINE = re.compile(r"line:? (\d+)")


def restore_error(program: str, code: int, stderr: str, line_of: Callable[[int], str]) -> RestoreError:
    """Return what a failed restore means: why, and at which line of its input; `line_of` looks one up by number."""
    said = [line.strip() for line in stderr.splitlines()]
    said = [line for line in said if line and not line.startswith(("Try `", "# "))]
    found = _LINE.search(stderr)
    line = line_of(int(found[1])) if found is not None else ""
    if line == "COMMIT":  # where the kernel was asked, and not what it refused
        line = ""
    # The nf_tables variant puts its name on a line of its own before the reason.
    reason = next((each for each in said if not each.endswith("):")), first_line(stderr))
    where = f" at {line!r}" if line else ""
    return RestoreError(f"{program} failed with status {code}: {reason}{where}", line=line)


_LEGACY_NAMES = {
    Family.IPV4: Path("/proc/thread-self/net/ip_tables_names"),
    Family.IPV6: Path("/proc/thread-self/net/ip6_tables_names"),
}
"""What legacy tables exist in this network namespace."""
_LOCKED = 4
"""The exit status of iptables-legacy when somebody else holds its lock for all of the time it may wait."""


def check_tables(family: Family, version: IptablesVersion) -> None:
    """Raise `CommandError` if the kernel lacks a table that Services need, `InconclusiveError` if that cannot be told.

    iptables-legacy is asked, in one run of a program, for those tables that do not exist yet; that creates them, as the
    first sync would. iptables-nft asks the kernel only when it has something to write, so the kernel is asked directly.
    """
    reason = _refused_by_nft(family) if version.nft else _refused_by_legacy(family, f"{program_of(family)}-restore")
    if reason:
        raise CommandError(f"the kernel lacks one of the tables {', '.join(TABLES)}: {reason}")


def _refused_by_nft(family: Family) -> str:
    try:
        return nat_unsupported_reason(family)
    except OSError as error:
        raise InconclusiveError(f"cannot ask the kernel for its tables of {family.value}: {error.strerror}") from None


def _refused_by_legacy(family: Family, program: str) -> str:
    existing = _names(_LEGACY_NAMES[family])
    text = "".join(f"*{table}\nCOMMIT\n" for table in TABLES if table not in existing)
    if not text:
        return ""
    done = run([program, "--test", "--noflush", "-w", str(LOCK_WAIT_SECONDS)], text, timeout=PROBE_TIMEOUT_SECONDS)
    if done.code < 0:
        raise InconclusiveError(f"{program}: {done.error_message}")
    return str(restore_error(program, done.code, done.stderr, lambda _: "")) if done.code not in {0, _LOCKED} else ""


def _names(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
