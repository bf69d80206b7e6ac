"""Run `iptables-restore`, `iptables-save` and `iptables`, and convert their errors to exceptions."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import deque
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
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
from kproxy.host.nf_tables import (
    awaken,
    chain_names,
    count_rules,
    current_generation,
    fingerprints,
    is_dormant,
    nat_unsupported_reason,
)
from kproxy.host.x_tables import TableInfoSocket
from kproxy.iptables.foreign_changes import CommitCount, ForeignChanges, GenerationCounter, TableObserver
from kproxy.iptables.names import ChainName
from kproxy.iptables.save_restore import (
    TABLES,
    UNREADABLE_RULE,
    SaveError,
    incompatible_line,
    parse_rules,
    parse_save,
)
from kproxy.model.drift import CommitAuthor
from kproxy.model.types import Family

LOCK_WAIT_SECONDS = 5
"""How long a command waits for the xtables lock. iptables-legacy acquires this lock for every change."""
COMMAND_SECONDS = 60.0
"""Time limit for one iptables command, and for iptables-restore to process a short input."""
SAVE_SECONDS = 120.0
"""Time limit for iptables-save to print its first lines. iptables-nft first reads all rules, 15,000 a second."""
SECONDS_PER_CHARACTER = 1e-4
"""How much each character of input that iptables-restore may not have processed yet adds to its time limit.

This is 10 ms for a rule, a hundred times as long as usual.
"""
MAX_PATIENCE = 16
"""Each time a program exceeds its time limit, the next limits are twice as long, up to this factor."""
MAX_CONTENT_SIZE = 32 << 20
"""Maximum size in bytes of a table of iptables-legacy whose rules are read to notice changes by other processes.

That many bytes are needed for 1,700 Services with 10 endpoints each. Reading them takes 150 ms.
"""
# Exit statuses of iptables (enum xtables_exittype in xtables.h).
_OTHER_PROBLEM = 1
"""The chain or rule does not exist, or a chain to be created already exists."""
_PARAMETER_PROBLEM = 2
"""The rule is invalid: for example, it jumps to a chain that does not exist."""
_VERSION_PROBLEM = 3
"""iptables-nft cannot print a rule that nft created.

Depending on the rule, iptables-nft has printed the preceding rules, or has reported the whole chain or table as
incompatible.
"""
_RESOURCE_PROBLEM = 4
"""Another process held the lock of iptables-legacy for the whole waiting time."""
_MAX_SINGLE_RULE_READS = 1000
"""How many rules of a chain are read one by one before the search is abandoned. Reading a rule takes 3 ms."""
_READ_AHEAD = (1 << 20) + (1 << 16)
"""Upper bound in characters for the input that a program has not processed yet: a full pipe plus the buffer into which
the program reads.

A pipe has a capacity of 16 pages (pipe(7)). This is 64 KiB, or 1 MiB on a kernel with 64-KiB pages.
"""
_LINE_NUMBER = re.compile(r"line:? (\d+)")
_CHAIN_OF_RULE = re.compile(r"rule in chain (\S+)")
_AFFECTS_ALL = ("holding the xtables lock", "Permission denied", "initialize", "Could not fetch rule set")
"""Messages of iptables-restore about problems that do not depend on the input."""
_LEGACY_TABLE_FILES = {
    Family.IPV4: Path("/proc/thread-self/net/ip_tables_names"),
    Family.IPV6: Path("/proc/thread-self/net/ip6_tables_names"),
}
"""The files that list the iptables-legacy tables of this network namespace."""


class RestoreError(Exception):
    """`iptables-restore` failed.

    Usually, the kernel has rejected the transaction for a table. In that case, neither this transaction nor any later
    one was applied. Other causes are that another process holds the xtables lock, or that the program exceeds the time
    limit, is killed, or exits before it has read all of its input. Transactions before the failure stay applied.

    `line` is the rejected line of the input, or "" if iptables did not report it. `chain` is the name of the chain that
    contains the rejected rule, or "" if it is unknown. `affects_all` is true if any other input would have failed, too,
    for example because another process holds the lock, or because the program was killed. If it is false, this is
    unknown.
    """

    def __init__(self, message: str, *, line: str = "", chain: str = "", affects_all: bool = False) -> None:
        super().__init__(message)
        self.line = line
        self.chain = chain
        self.affects_all = affects_all


class IptablesVersion(Struct, frozen=True):
    """The version of iptables. `nft` is true if it uses nf_tables, and false if it uses x_tables (iptables-legacy)."""

    number: tuple[int, ...]
    nft: bool

    @property
    def random_fully(self) -> bool:
        """Whether MASQUERADE supports `--random-fully` (since 1.6.2)."""
        return self.number >= (1, 6, 2)

    @property
    def supports_patching(self) -> bool:
        """Whether individual rules can be changed quickly.

        Since version 1.8.5, iptables-nft reads only the affected chain to change a rule.
        """
        return self.nft and self.number >= (1, 8, 5)

    def __str__(self) -> str:
        number = ".".join(map(str, self.number))
        return f"iptables {number} ({'nf_tables' if self.nft else 'legacy'})"


def parse_version(text: str) -> IptablesVersion:
    """Parse the output of `iptables --version`, such as `iptables v1.8.9 (nf_tables)`. Raises `CommandError`.

    Versions before 1.8 do not support nf_tables and print only their number.
    """
    match = re.search(r"v(\d+(?:\.\d+)*)", text)
    if match is None:
        raise CommandError(f"cannot parse the iptables version {first_line(text)!r}")
    return IptablesVersion(tuple(int(part) for part in match[1].split(".")), nft="nf_tables" in text)


def program_name(family: Family) -> str:
    """Return the name of a family's iptables program. Append `-save` or `-restore` for the other programs."""
    return "ip6tables" if family is Family.IPV6 else "iptables"


class IptablesRunner:
    """Runs the iptables programs of one IP family. The programs must be in PATH."""

    def __init__(
        self,
        family: Family,
        on_progress: Callable[[], object] = lambda: None,
        generations: GenerationCounter | None = None,
    ) -> None:
        """Create a runner that calls `on_progress` while `iptables-restore` processes its input.

        Runners in the same process should share `generations`, which counts their transactions (iptables-nft).
        """
        self._family = family
        self._generations = generations or GenerationCounter(current_generation)
        self._program = program_name(family)
        self._commands = CommandRunner(on_progress)
        self._version: IptablesVersion | None = None
        self.patience = 1
        """The factor of all time limits. It grows with each program that exceeds its limit."""
        self._changes: ForeignChanges | None = None
        self._own_port: int | None = None

    @property
    def family(self) -> Family:
        """The IP family whose rules this runner reads and changes."""
        return self._family

    def stop(self) -> None:
        """Kill the running program, and do not start any more programs. Any thread may call this.

        A transaction that the program has begun to send is applied completely or not at all. When this call returns,
        the kernel is no longer applying it, so the next kproxy process reads the final state.
        """
        self._commands.stop()

    def has_run(self, pid: int) -> bool:
        """Return whether a process belongs to an iptables program that this runner runs or has just run.

        Netlink port IDs of programs are PIDs. The port ID with which this runner awakens tables counts, too.
        """
        return pid == self._own_port or self._commands.has_run(pid)

    def has_committed(self, commit: CommitAuthor) -> bool:
        """Return whether a commit was made by kproxy, if `has_run` has returned True for its netlink port ID."""
        return commit.port == self._own_port or self._commands.has_committed(commit)

    def version(self) -> IptablesVersion:
        """Return the version of the installed iptables. It is read only once. Raises `CommandError`."""
        if self._version is None:
            self._version = self._read_version()
        return self._version

    def _read_version(self) -> IptablesVersion:
        done = self._commands.run([self._program, "--version"], timeout=PROBE_TIMEOUT_SECONDS)
        if done.code:
            error = InconclusiveError if done.code < 0 else CommandError
            raise error(f"{self._program} --version failed: {done.error_message}")
        return parse_version(done.stdout)

    def _foreign(self) -> ForeignChanges:
        if self._changes is None:
            if self.version().nft:
                self._changes = self._generations
            else:
                tables = TableInfoSocket(self._family)
                self._changes = TableObserver(
                    lambda: tuple(tables.layout(table) for table in TABLES),
                    lambda: _content(tables),
                )
        return self._changes

    def foreign_changes(self) -> int | None:
        """Return a number that differs from earlier ones if another process has changed rules since.

        Return None while this process is changing rules. With iptables-legacy, changes that leave the layout of the
        tables as it was are noticed later, and not at all in large tables. Raises `OSError` or `CommandError`.
        """
        return self._foreign().now()

    def latest_foreign_changes(self) -> int:
        """Return the result of `foreign_changes` as of the latest time at which this process was not changing rules.

        Raises `OSError` or `CommandError`.
        """
        return self._foreign().latest()

    def fingerprints(self, groups: Iterable[Sequence[ChainName]]) -> list[int] | None:
        """Return a number for each group of chains, which identifies the rules of these chains.

        Return None for iptables-legacy. See `kproxy.host.nf_tables.fingerprints`. Raises `OSError` or `CommandError`.
        """
        if not self.version().nft:
            return None
        wanted = list(groups)
        return retry_interrupted(lambda: fingerprints(self._family, wanted))

    def chain_names(self) -> dict[str, set[str]]:
        """Return the names of the chains of each table that has any. Only for iptables-nft. Raises `OSError`."""
        return retry_interrupted(partial(chain_names, self._family))

    @contextmanager
    def save(self, table: str = "") -> Iterator[Iterator[str]]:
        """Yield the rules of one table, or of all tables, as lines for `parse_save`, while iptables prints them.

        Raises `CommandError`.

        iptables-nft stops at a rule that it cannot print. In this case, each table is read separately, so that the
        other tables can still be read. Tables are not read separately from the start, because iptables-nft takes as
        long to print one table as to print all of them.

        Any failure of iptables-nft after the program was started is handled in this way. For each table that cannot be
        read, the lines contain an `incompatible_line` with the reason. `CommandError` is raised if a program cannot be
        started, for every failure of iptables-legacy, and if the caller gets a `SaveError`.
        """
        try:
            with closing(self._dump_table(table) if table else self._dump()) as lines:
                yield lines
        except SaveError as error:
            raise CommandError(f"cannot read the rules of {self._program}: {error}") from None

    def _dump_table(self, table: str) -> Generator[str, None, None]:
        if error := (yield from self._read_lines([f"{self._program}-save", "-t", table])):
            yield incompatible_line(table, error)

    def _dump(self) -> Generator[str, None, None]:
        if (yield from self._read_lines([f"{self._program}-save"])):
            for table in TABLES:
                yield from self._dump_table(table)

    def _read_lines(self, argv: Sequence[str]) -> Generator[str, None, str]:
        """Yield the lines that the program prints. Return the reason if iptables-nft failed after starting, else "".

        Raises `CommandError` if the program cannot be started. Also raises it for every failure of iptables-legacy,
        because individual rules never make iptables-legacy fail.
        """
        nft = self.version().nft
        started = False
        try:
            with self._commands.stream_output(argv, timeout=SAVE_SECONDS * self.patience) as lines:
                started = True
                yield from lines
        except CommandError as error:
            if not (nft and started):
                raise
            return str(error)
        return ""

    def restore(self, text: str) -> None:
        """Apply input for `iptables-restore --noflush`, in one transaction per table.

        Chains that `text` does not name are not changed. Raises `RestoreError`, or `CommandError` if the program cannot
        be started.
        """
        self.restore_each([text])

    def restore_each(self, texts: Iterable[str]) -> None:
        """Apply several inputs in order, as `restore` does, and stop at the first failure.

        One process applies all inputs. It applies the changes to a table as soon as it has read them, while later texts
        are still being generated. One process per text would take ten times as long. Raises `RestoreError`, or
        `CommandError` if the program cannot be started. Exceptions raised while `texts` are generated propagate.
        """
        argv = [f"{self._program}-restore", "--noflush", "-w", str(LOCK_WAIT_SECONDS)]
        remaining = iter(texts)
        first = next(remaining, None)
        if first is None:
            return
        recent = RecentInput()
        with self._own_changes() as commits:
            chunks = commits.counted(itertools.chain([first], remaining))
            done = self._commands.stream_input(
                argv,
                recent.record(chunks),
                timeout=lambda: self.patience * (COMMAND_SECONDS + recent.size * SECONDS_PER_CHARACTER),
            )
            self.patience = min(2 * self.patience, MAX_PATIENCE) if done.timed_out else 1
            if done.code:
                raise make_restore_error(argv[0], done.code, done.stderr, recent.line)

    def has_rule(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule. The rule is given without `-A CHAIN`. Raises `CommandError`.

        Return None if this cannot be determined because the chain has rules that iptables cannot print.
        """
        code = self._run(chain, "-C", rule, accepted=(_OTHER_PROBLEM, _PARAMETER_PROBLEM, _VERSION_PROBLEM)).code
        return self._search_rule_by_rule(chain, f"-A {chain.name} {rule}") if code == _VERSION_PROBLEM else code == 0

    def _search_rule_by_rule(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, or None if this cannot be determined.

        The rules are read one by one, so that rules that iptables cannot print are skipped. The result is None if the
        rules cannot be listed, or if the rule is not found among the first `_MAX_SINGLE_RULE_READS` rules and the chain
        may have more.
        """
        for number in range(1, _MAX_SINGLE_RULE_READS + 1):
            done = self._run(chain, "-S", str(number), accepted=(_OTHER_PROBLEM, _VERSION_PROBLEM))
            if done.code == _OTHER_PROBLEM:
                return None
            listed = parse_rules(done.stdout)
            if rule in listed:
                return True
            if done.code == 0 and not listed:
                return False
        return None

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist, normalized as in `parse_save`. Raises `CommandError`.

        If iptables-nft cannot print a rule, it does not print the following rules either. `UNREADABLE_RULE` is then the
        last item of the chain's list. If the rule makes iptables-nft reject the whole chain, the chain is omitted: this
        cannot be told apart from a chain that does not exist.
        """
        if self.version().nft:
            return {chain: rules for chain in chains if (rules := self._list_chain(chain)) is not None}
        found: dict[ChainName, list[str]] = {}
        names: dict[str, list[str]] = {}
        for chain in chains:
            names.setdefault(chain.table, []).append(chain.name)
        for table, selected in names.items():
            # iptables-legacy always reads a whole table, so read it only once for all chains.
            prefixes = ("*", "COMMIT", *(f":{name} " for name in selected), *(f"-A {name} " for name in selected))
            argv = [f"{self._program}-save", "-t", table]
            with self._commands.stream_output(argv, timeout=SAVE_SECONDS * self.patience) as lines:
                try:
                    saved = parse_save(line for line in lines if line.startswith(prefixes))
                except SaveError as error:
                    raise CommandError(f"cannot read the rules of {self._program}: {error}") from None
            found |= {chain: content.rules for chain, content in saved.chains.items()}
        return found

    def _list_chain(self, chain: ChainName) -> list[str] | None:
        done = self._run(chain, "-S", accepted=(_OTHER_PROBLEM, _VERSION_PROBLEM))
        if done.code == _OTHER_PROBLEM:
            return None
        return parse_rules(done.stdout) + [UNREADABLE_RULE] * (done.code == _VERSION_PROBLEM)

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        """Return the number of rules in each chain, which is 0 for a chain that does not exist. Only for iptables-nft.

        Chains whose rules cannot be counted are omitted.
        """
        counts: dict[ChainName, int] = {}
        for chain in chains:
            with suppress(OSError):
                counts[chain] = retry_interrupted(partial(count_rules, self._family, chain.table, chain.name))
        return counts

    def create_chain(self, chain: ChainName) -> None:
        """Create a chain if it does not exist; existing rules are kept. Raises `CommandError`."""
        with self._own_changes() as commits:
            commits.count += self._run(chain, "-N", accepted=(_OTHER_PROBLEM,)).code == 0

    def awaken(self, table: str) -> bool:
        """Clear the flag of a dormant table, whose chains the kernel does not evaluate. Return whether it was set.

        Tables of iptables-legacy are never dormant. Raises `CommandError`.
        """
        if not self.version().nft:
            return False
        try:
            if not is_dormant(self._family, table):
                return False
            with self._own_changes() as commits:
                awaken(self._family, table, self._set_own_port)
                commits.count += 1
        except OSError as error:
            raise CommandError(f"cannot awaken the dormant table {table}: {error.strerror or error}") from None
        return True

    def _set_own_port(self, port: int) -> None:
        self._own_port = port

    def _own_changes(self) -> AbstractContextManager[CommitCount]:
        try:
            return self._foreign().own_changes()
        except (OSError, CommandError):
            return nullcontext(CommitCount())

    def _run(self, chain: ChainName, command: str, rule: str = "", *, accepted: Container[int]) -> CompletedCommand:
        """Run an iptables command. Raises `CommandError` unless its exit status is 0 or `accepted`."""
        argv = [self._program, "-w", str(LOCK_WAIT_SECONDS), "-t", chain.table, command, chain.name, *shlex.split(rule)]
        done = self._commands.run(argv, timeout=COMMAND_SECONDS * self.patience)
        if done.code and done.code not in accepted:
            raise CommandError(f"{self._program} failed with status {done.code}: {first_line(done.stderr)}")
        return done


def _content(tables: TableInfoSocket) -> tuple[bytes, ...] | None:
    """Return a value that changes with any rule, or None if the tables are too large. Raises `OSError`."""
    contents = []
    for table in TABLES:
        if (content := tables.content(table, MAX_CONTENT_SIZE)) is None:
            return None
        contents.append(content)
    return tuple(contents)


class RecentInput:
    """The most recent part of a long input that a program is reading.

    It is used to find the input line to which the program's error message refers.
    """

    def __init__(self) -> None:
        self._texts: deque[str] = deque()
        self.size = 0
        """Number of characters that are remembered. The program has processed everything before them."""
        self._dropped_lines = 0

    def record(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts unchanged and remember the most recent ones. Each text must consist of complete lines."""
        for text in texts:
            while self._texts and self.size - len(self._texts[0]) > _READ_AHEAD:
                self.size -= len(self._texts[0])
                self._dropped_lines += self._texts.popleft().count("\n")
            self._texts.append(text)
            self.size += len(text)
            yield text

    def line(self, number: int) -> str:
        """Return the line with this number, counting from 1, or "" if it does not exist or is no longer remembered."""
        lines = "".join(self._texts).splitlines()
        index = number - 1 - self._dropped_lines
        return lines[index] if 0 <= index < len(lines) else ""


def make_restore_error(program: str, code: int, stderr: str, line_at: Callable[[int], str]) -> RestoreError:
    """Return the error for a failed restore, with the reason and the rejected line.

    `code` is the exit status. `line_at` returns an input line by its number, counting from 1.
    """
    messages = [line.strip() for line in stderr.splitlines()]
    messages = [line for line in messages if line and not line.startswith(("Try `", "# ", "Warning: "))]
    match = next((found for message in messages if (found := _LINE_NUMBER.search(message))), None)
    line = line_at(int(match[1])) if match is not None else ""
    if line == "COMMIT":  # the kernel rejected the transaction, but not because of this line
        line = ""
    # iptables-nft prints its name on a separate line before the reason.
    reason = next((message for message in messages if not message.endswith("):")), first_line(stderr))
    position = f" at {line!r}" if line else ""
    named = next((found for message in messages if (found := _CHAIN_OF_RULE.search(message))), None)
    chain = _chain_of(line) or (named[1] if named is not None else "")
    return RestoreError(
        f"{program} failed with status {code}: {reason}{position}",
        line=line,
        chain=chain,
        affects_all=code < 0 or any(text in stderr for text in _AFFECTS_ALL),
    )


def _chain_of(line: str) -> str:
    """Return the name of the chain that a line of input creates or changes, or "" for any other line."""
    if line.startswith(":"):
        return line[1:].partition(" ")[0]
    return line.split(" ", 2)[1] if line.startswith("-") and " " in line else ""


def check_tables(family: Family, version: IptablesVersion) -> None:
    """Raise `CommandError` if the kernel lacks a required table.

    With iptables-legacy, the check is a single `iptables-restore --test` whose input names all tables that do not exist
    yet. This makes the kernel create them, as the first sync would. `CommandError` is also raised if the program cannot
    be run. If another process holds the xtables lock, the tables are assumed to be available.

    iptables-nft contacts the kernel only if it has something to write, so the kernel's support for NAT is checked over
    netlink instead.

    Raises `InconclusiveError` if the result is unknown, for example because the program was killed.
    """
    reason = _nft_problem(family) if version.nft else _legacy_problem(family, f"{program_name(family)}-restore")
    if reason:
        raise CommandError(f"the kernel lacks one of the tables {', '.join(TABLES)}: {reason}")


def _nft_problem(family: Family) -> str:
    try:
        return nat_unsupported_reason(family)
    except OSError as error:
        raise InconclusiveError(f"cannot check the kernel's {family.value} tables: {error.strerror}") from None


def _legacy_problem(family: Family, program: str) -> str:
    existing = _legacy_tables(_LEGACY_TABLE_FILES[family])
    text = "".join(f"*{table}\nCOMMIT\n" for table in TABLES if table not in existing)
    if not text:
        return ""
    done = run([program, "--test", "--noflush", "-w", str(LOCK_WAIT_SECONDS)], text, timeout=PROBE_TIMEOUT_SECONDS)
    if done.code < 0:
        raise InconclusiveError(f"{program}: {done.error_message}")
    if done.code in {0, _RESOURCE_PROBLEM}:
        return ""
    return str(make_restore_error(program, done.code, done.stderr, lambda _: ""))


def _legacy_tables(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
