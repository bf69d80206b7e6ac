"""A backend whose periodic comparison also looks for chains of other programs that drop the packets of Services."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kproxy.host.blocking_chains import blocking_chains
from kproxy.host.nf_tables import current_generation
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.sync_report import ApplyResult, Plans
from kproxy.model.types import Family
from kproxy.sync.family_sync import Backend

log = logging.getLogger(__name__)


class WatchfulBackend:
    """Adds findings to the comparisons of another backend. Everything else is left to that backend.

    A chain is reported when it is first found, and again if it was gone in between.
    """

    def __init__(
        self, backend: Backend, find: Callable[[], Sequence[str]], read_generation: Callable[[], object]
    ) -> None:
        """`find` returns one line for each chain. It is called when a comparison begins.

        It is not called if `read_generation` returns the same as at the last call. Both may raise `OSError`.
        """
        self._backend = backend
        self._find = find
        self._read_generation = read_generation
        self._generation: object = None
        self._known: frozenset[str] = frozenset()
        self._comparing = False

    @property
    def needs_full_sync(self) -> bool:
        """See `Backend`."""
        return self._backend.needs_full_sync

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """See `Backend`."""
        return self._backend.sync(plans, context)

    def forget(self) -> None:
        """See `Backend`."""
        self._backend.forget()

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        """See `Backend`."""
        return self._backend.repair(touched, plans, context)

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        """See `Backend`. The findings are part of the first step of a comparison."""
        findings = () if self._comparing else self._new_findings()
        result = self._backend.compare_next(plans, context)
        self._comparing = result is not None
        if not findings:
            return result
        if result is None:
            return RepairResult(findings=findings)  # the next call begins another comparison
        return RepairResult(result.repaired, (*result.findings, *findings), result.needs_full_sync)

    def _new_findings(self) -> tuple[str, ...]:
        try:
            generation = self._read_generation()
            if generation == self._generation:
                return ()
            found = self._find()
        except OSError as error:  # the next comparison tries again
            log.debug("cannot look for chains that drop packets of Services: %s", error.strerror or error)
            return ()
        self._generation = generation
        new = tuple(each for each in found if each not in self._known)
        self._known = frozenset(found)
        return new


def watchful(backend: Backend, family: Family, *own_tables: str) -> WatchfulBackend:
    """Return a backend that also looks for chains that drop packets, except for those of `own_tables`."""
    return WatchfulBackend(backend, partial(blocking_chains, family, own_tables), current_generation)
