"""Wrappers of the fake kernels whose operations fail at random, and can be interrupted before and after each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from random import Random
from typing import Any, cast

from kproxy.host.commands import CommandError
from kproxy.iptables.backend import IptablesKernel
from kproxy.iptables.runner import RestoreError
from kproxy.nftables.backend import NftablesKernel
from kproxy.nftables.kernel import GenerationChangedError, TableChangingError, TableError
from kproxy.nftables.transaction import Transaction
from tests.fakekernel import FakeKernel
from tests.faketable import FakeTable

FAULT_RATE = 0.1


class Faults:
    """Decides which kernel operations fail, from a seeded random generator.

    `down` makes every operation fail.
    """

    def __init__(self, random: Random, rate: float = FAULT_RATE) -> None:
        self.random = random
        self.rate = rate
        self.down = False
        self.injected: Counter[str] = Counter()

    def strikes(self, operation: str) -> bool:
        """Return whether this operation fails."""
        failed = self.down or (self.rate > 0 and self.random.random() < self.rate)
        self.injected[operation] += failed
        return failed

    def stop(self) -> None:
        """Let all later operations succeed."""
        self.rate, self.down = 0.0, False


def _ignore(operation: str) -> None:
    pass


_NOT_OPERATIONS = {"dump", "increment_generation", "reject"}
"""What only tests use: it never fails."""


class _Faulty:
    """A kernel whose operations fail. `step` is called with the operation's name before and after it runs."""

    def __init__(self, kernel: Any, faults: Faults, step: Callable[[str], None] = _ignore) -> None:
        self._kernel = kernel
        self._faults = faults
        self._step = step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        return partial(self._run, name, found) if callable(found) and name not in _NOT_OPERATIONS else found

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._kernel, name, value)

    def _run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._step(f"before {name}")
        if self._faults.strikes(name):
            raise self._error(name)
        try:
            result = function(*args, **kwargs)
        except AssertionError:  # the fakes insist that a table exists, but another process can delete it at any time
            raise self._error(name) from None
        self._step(f"after {name}")
        return result

    def _error(self, name: str) -> Exception:
        raise NotImplementedError


class FaultyTable(_Faulty):
    """A fake nftables table whose operations fail as the real kernel's do."""

    def _error(self, name: str) -> Exception:
        if name != "generation" and self._faults.random.random() < 0.5:
            return TableChangingError("the table keeps changing")
        return TableError("cannot read the table: Cannot allocate memory")

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        self._step("before commit")
        random = self._faults.random
        if self._faults.strikes("commit"):
            if generation is not None and not self._faults.down and random.random() < 0.3:
                raise GenerationChangedError
            # After a lost reply, nobody knows whether the kernel has applied the transaction.
            if not self._faults.down and random.random() < 0.3:
                self._kernel.commit(transaction, generation)
                raise TableError("cannot receive the reply: No buffer space available", inconclusive=True)
            raise TableError("Cannot allocate memory")
        self._kernel.commit(transaction, generation)
        self._step("after commit")


class FaultyIptables(_Faulty):
    """Fake iptables programs that fail as the real ones do."""

    def __init__(
        self, kernel: Any, faults: Faults, step: Callable[[str], None], refuse: Callable[[str], str | None]
    ) -> None:
        """`refuse` returns the line because of which the kernel rejects the input for one table, or None."""
        super().__init__(kernel, faults, step)
        self._refuse = refuse

    def _error(self, name: str) -> Exception:
        return CommandError(f"iptables failed with status 4: {name}: Resource temporarily unavailable")

    @contextmanager
    def save(self, *args: Any, **kwargs: Any) -> Iterator[Iterator[str]]:
        self._step("before save")
        if self._faults.strikes("save"):
            raise self._error("save")
        with cast("AbstractContextManager[Iterator[str]]", self._kernel.save(*args, **kwargs)) as lines:
            yield self._until_failure(lines)
        self._step("after save")

    def _until_failure(self, lines: Iterator[str]) -> Iterator[str]:
        fails_after = self._faults.random.randrange(40) if self._faults.strikes("save, midway") else -1
        for number, line in enumerate(lines):
            if number == fails_after:
                raise self._error("save")
            yield line

    def restore(self, text: str) -> None:
        self.restore_each([text])

    def restore_each(self, texts: Iterable[str]) -> None:
        """Apply the inputs table by table, as `iptables-restore` does."""
        random = self._faults.random
        self._step("before restore")
        for text in texts:
            for block in text.split("COMMIT\n")[:-1]:
                if self._faults.strikes("restore"):
                    if not self._faults.down and random.random() < 0.2:
                        self._kernel.restore(f"{block}COMMIT\n")  # it was killed after it had sent the transaction
                        raise _failed_restore("iptables-restore was killed", affects_all=True)
                    if random.random() < 0.2:
                        raise CommandError("cannot start iptables-restore: Cannot allocate memory")
                    lines = [line for line in block.splitlines() if line[:1] == "-"]
                    line = random.choice(lines) if lines and random.random() < 0.5 else ""
                    # iptables does not always tell whether a failure has to do with the input.
                    raise _failed_restore("Resource temporarily unavailable", line, affects_all=random.random() < 0.5)
                if (refused := self._refuse(block)) is not None:
                    # Some versions of iptables do not tell the line.
                    raise RestoreError("iptables-restore failed", line=refused if random.random() < 0.5 else "")
                self._kernel.restore(f"{block}COMMIT\n")
                self._step("after restore")

    def count_rules(self, chains: Any) -> Any:
        self._step("before count_rules")
        return {} if self._faults.strikes("count_rules") else self._kernel.count_rules(chains)


def _failed_restore(reason: str, line: str = "", *, affects_all: bool) -> RestoreError:
    error = RestoreError(f"iptables-restore failed: {reason}", line=line)
    if hasattr(error, "affects_all"):
        error.affects_all = affects_all
    return error


def faulty_table(table: FakeTable, faults: Faults, step: Callable[[str], None] = _ignore) -> NftablesKernel:
    """Return a table whose operations fail."""
    return cast("NftablesKernel", FaultyTable(table, faults, step))


def faulty_iptables(
    kernel: FakeKernel,
    faults: Faults,
    step: Callable[[str], None] = _ignore,
    refuse: Callable[[str], str | None] = lambda _: None,
) -> IptablesKernel:
    """Return iptables programs that fail."""
    return cast("IptablesKernel", FaultyIptables(kernel, faults, step, refuse))
