"""Program all Services of a rejected transaction except those because of which the kernel rejected it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.types import ServiceKey
from kproxy.nftables.rejection import DRIFT_CODES, RejectedObject, ServiceChange, find_culprits

MIN_FAILURES = 4
"""If the kernel rejects all Services of a transaction, and they are this many or more, none of them is the culprit."""

Changes: TypeAlias = Mapping[ServiceKey, ServiceChange]


class Rejection(Struct, frozen=True):
    """A transaction that the kernel rejected: the reason on one line, and the rejected objects if they are known."""

    reason: str
    objects: Sequence[RejectedObject] = ()


class NoCulpritError(Exception):
    """The kernel rejects a transaction for a reason that is not a Service. If `is_drift`, the table was changed."""

    def __init__(self, rejection: Rejection, *, is_drift: bool = False) -> None:
        super().__init__(rejection.reason)
        self.is_drift = is_drift


class Isolation:
    """Programs the Services of a rejected transaction in smaller transactions.

    A culprit is found by the objects that the kernel rejected or, if these are unknown, by bisection. The changes of a
    culprit are dropped.
    """

    def __init__(
        self,
        try_changes: Callable[[Changes], Rejection | None],
        may_be_drift: Callable[[], bool],
        known: Collection[ServiceKey] = (),
    ) -> None:
        """`try_changes` commits changes in one transaction. It returns None, or why the kernel rejected all of them.

        `may_be_drift` tells whether another process may have changed the table since its contents were known. The
        kernel has already rejected the Services in `known` in an earlier sync.
        """
        self._try = try_changes
        self._may_be_drift = may_be_drift
        self._known = known
        self._accepted = False
        self.culprits: dict[ServiceKey, str] = {}

    def program(self, changes: Changes, rejection: Rejection) -> None:
        """Program the changes of a transaction that the kernel rejected. Add the culprits to `culprits`.

        Raises `NoCulpritError` if the reason of the rejection is not a Service. Some of the changes may have been
        programmed then. The same applies to any error that `try_changes` raises.
        """
        remaining: Changes = changes
        while True:
            found = find_culprits(rejection.objects, remaining)
            if not found:
                break
            self._check_drift(found, rejection)
            for key, rejected in found.items():
                self.culprits[key] = rejected.reason
            remaining = {key: change for key, change in remaining.items() if key not in found}
            self._check_total_failure(remaining, rejection)
            again = self._try(remaining)
            if again is None:
                self._accepted |= bool(remaining)
                return
            rejection = again
        if rejection.objects:
            raise NoCulpritError(rejection)
        self._bisect(remaining, rejection)

    def _bisect(self, changes: Changes, rejection: Rejection) -> None:
        if not changes:
            raise NoCulpritError(rejection)
        if len(changes) == 1:
            self.culprits |= dict.fromkeys(changes, rejection.reason)
            self._check_total_failure({}, rejection)
            return
        items = list(changes.items())
        middle = len(items) // 2
        for half in (dict(items[:middle]), dict(items[middle:])):
            rejected = self._try(half)
            if rejected is None:
                self._accepted = True
            else:
                self.program(half, rejected)

    def _check_total_failure(self, remaining: Changes, rejection: Rejection) -> None:
        unknown = len(self.culprits.keys() - self._known)
        if not remaining and not self._accepted and unknown >= MIN_FAILURES:
            raise NoCulpritError(rejection)

    def _check_drift(self, found: Mapping[ServiceKey, RejectedObject], rejection: Rejection) -> None:
        unexpected = (key for key, rejected in found.items() if rejected.code in DRIFT_CODES)
        if self._may_be_drift() and any(key not in self._known for key in unexpected):
            raise NoCulpritError(rejection, is_drift=True)
