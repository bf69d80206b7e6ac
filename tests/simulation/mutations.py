"""Faults planted in kproxy, to prove that the simulation finds them: `python -m tests.simulation.mutations`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.diff import IptablesDiff
from kproxy.iptables.ledger import IptablesSnapshot
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import SyncError
from kproxy.nftables import diff as nftables_diff
from kproxy.nftables import shared_chains
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.diff import NftablesDiff
from kproxy.sync.family_sync import FamilySync, PendingChanges
from kproxy.sync.quarantine import Quarantine
from kproxy.sync.reconciler import Reconciler
from kproxy.sync.repair_schedule import RepairSchedule
from kproxy.sync.schedule import Schedule
from tests.simulation.capabilities import quarantines, repairs_exactly
from tests.simulation.history import ViolationError, World

Patch = tuple[object, str, Any]
"""An object, the name of its attribute, and the mutated attribute."""


def _nothing(*_: object, **__: object) -> None:
    pass


def _after(owner: object, name: str, then: Callable[..., Any]) -> Patch:
    """Pass the result of a function to `then`, and return what that returns."""
    original = getattr(owner, name)

    def mutated(*args: Any, **kwargs: Any) -> Any:
        return then(original(*args, **kwargs))

    return owner, name, mutated


def _sync_forgetting_pending(sync: FamilySync, store: Store, now: float = 0.0) -> Any:
    pending, sync._pending = sync._pending, PendingChanges()
    return sync._sync(store, pending, now)


def _keep_ledger(backend: type[IptablesBackend] | type[NftablesBackend]) -> Patch:
    original = backend.sync

    def mutated(self: Any, plans: Any, context: Any) -> Any:
        ledger = self._ledger
        try:
            return original(self, plans, context)
        except SyncError:
            self._ledger = ledger
            raise

    return backend, "sync", mutated


def _ignore_errors(owner: object, name: str) -> Patch:
    original = getattr(owner, name)

    def mutated(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception:  # noqa: BLE001 - that is the mutation
            return None

    return owner, name, mutated


def _list_without_deletions() -> Patch:
    original = Store._replace

    def mutated(store: Store, delta: Any) -> Any:
        with patch.object(store, "_identities", lambda _: set()):
            return original(store, delta)

    return Store, "_replace", mutated


def _dispatch_first() -> Patch:
    original = IptablesDiff.transactions

    def mutated(diff: IptablesDiff) -> Iterator[Any]:
        return iter(list(original(diff))[::-1])

    return IptablesDiff, "transactions", mutated


def _started_late(schedule: Schedule, now: float) -> None:
    schedule._not_before = now


def _succeeded_late(schedule: Schedule) -> None:
    schedule._pending = False


def _drop_all(schedule: RepairSchedule, _: float) -> dict[str, Any]:
    schedule._waiting.clear()
    return {}


MUTATIONS: Mapping[str, Callable[[], list[Patch]]] = {
    "a failed sync forgets its pending changes": lambda: [(FamilySync, "sync", _sync_forgetting_pending)],
    "a failed sync is not retried": lambda: [(Schedule, "failed", _nothing)],
    "a change during a sync does not cause another one": lambda: [
        (Schedule, "started", _started_late),
        (Schedule, "succeeded", _succeeded_late),
    ],
    "the changes of a slice do not make its Service pending": lambda: [
        _after(Store, "_put_slice", lambda _: StoreChange())
    ],
    "the deletion of a slice does not make its Service pending": lambda: [
        _after(Store, "_remove_slice", lambda _: frozenset())
    ],
    "a list does not delete the objects that it lacks": lambda: [_list_without_deletions()],
    "iptables: a failed sync keeps the ledger": lambda: [_keep_ledger(IptablesBackend)],
    "iptables: dispatch rules are written before the chains": lambda: [_dispatch_first()],
    "iptables: dispatch chains are not rewritten": lambda: [
        _after(IptablesDiff, "_entry_change", lambda change: type(change)())
    ],
    "iptables: unused chains are not found after a restart": lambda: [
        (IptablesSnapshot, "stale_chains", lambda *_: [])
    ],
    "iptables: missing jumps are not restored": lambda: [(IptablesDiff, "_ensure_rules", _nothing)],
    "iptables: errors of a restore are ignored": lambda: [_ignore_errors(IptablesBackend, "_apply")],
    "nftables: a failed sync keeps the ledger": lambda: [_keep_ledger(NftablesBackend)],
    "nftables: endpoints of existing frontends do not change": lambda: [(NftablesDiff, "_change_endpoints", _nothing)],
    "nftables: the chains of a Service do not change": lambda: [(NftablesDiff, "_change_service_chains", _nothing)],
    "nftables: verdicts are not compared": lambda: [(nftables_diff, "_verdict_elements", lambda _: {})],
    "nftables: chains have only their first rule": lambda: [
        _after(shared_chains, "numgen_moduli", lambda moduli: moduli[:1])
    ],
    "nftables: errors of a commit are ignored": lambda: [_ignore_errors(NftablesBackend, "_commit")],
    "touched parts are forgotten before they are checked": lambda: [(RepairSchedule, "take", _drop_all)],
    "the error of a check is ignored": lambda: [(Reconciler, "_receive_check", _nothing)],
    "comparisons never begin": lambda: [(Reconciler, "_check_drift", _nothing)],
    "the reconciler does not wake up for a retry": lambda: [(Reconciler, "sync_wait", _nothing)],
    "a quarantined Service is never tried again": lambda: [
        (Quarantine, "due", lambda *_: []),
        (Quarantine, "next_retry", None),
    ],
    "a quarantined Service counts as accepted": lambda: [(Quarantine, "update", lambda *_, **__: ())],
}
NEED_QUARANTINE = {"a quarantined Service is never tried again", "a quarantined Service counts as accepted"}
"""Mutations that change nothing if the backends quarantine no Service."""
NEED_EXACT_REPAIRS = {
    "touched parts are forgotten before they are checked",
}
"""Mutations that change nothing if the backends repair only what a comparison of counts finds."""


def applicable() -> list[str]:
    """Return the mutations that can make a difference."""
    quarantine = quarantines("nftables") or quarantines("iptables")
    exact = repairs_exactly("nftables")
    return [
        name
        for name in MUTATIONS
        if (quarantine or name not in NEED_QUARANTINE) and (exact or name not in NEED_EXACT_REPAIRS)
    ]


def find(name: str, count: int, start: int = 0) -> int | None:
    """Return the first seed whose history finds a mutation, or None."""
    for mode in ("nftables", "iptables"):  # what the backends can do is found out without the mutation
        repairs_exactly(mode)
    with ExitStack() as patches:
        for owner, attribute, mutated in MUTATIONS[name]():
            patches.enter_context(patch.object(owner, attribute, mutated))
        for seed in range(start, start + count):
            world = World(seed)
            if name.startswith(f"{'iptables' if world.nftables else 'nftables'}: "):
                continue  # the mutation changes nothing in this mode
            try:
                world.run()
            except ViolationError:
                return seed
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutations", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many seeds to try for each mutation")
    options = parser.parse_args()
    found = {}
    for name in applicable():
        found[name] = find(name, options.count)
        print(f"{name}: {'not found' if found[name] is None else f'seed {found[name]}'}", flush=True)  # noqa: T201
    return None in found.values()


if __name__ == "__main__":
    sys.exit(main())
