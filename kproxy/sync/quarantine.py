"""Quarantine: the Services of one family whose rules the kernel rejected, and when to try them again. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from msgspec import Struct

from kproxy.model.sync_report import ConditionTransition
from kproxy.model.types import Family, ServiceKey

FIRST_RETRY_SECONDS = 10.0
"""Seconds until the first retry of a quarantined Service. The delay doubles with each further rejection."""
MAX_RETRY_SECONDS = 600.0
"""Maximum number of seconds between two retries of a quarantined Service."""

_LINE_NUMBER = re.compile(r"\bline:? \d+")
"""The position of a rejected rule in the input of `iptables-restore`, which also contains other Services."""


class QuarantinedService(Struct, frozen=True):
    """A quarantined Service: the reason on one line, the time of the next retry, and the delay that led to it."""

    reason: str
    retry_at: float
    delay: float


class Quarantine:
    """The quarantined Services of one family.

    A quarantined Service keeps the rules that the kernel accepted last, if any. It is tried again when it changes, in
    every full sync, and after a delay that grows from `FIRST_RETRY_SECONDS` to `MAX_RETRY_SECONDS`.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._services: dict[ServiceKey, QuarantinedService] = {}

    def __len__(self) -> int:
        return len(self._services)

    @property
    def services(self) -> Mapping[ServiceKey, QuarantinedService]:
        """The quarantined Services."""
        return self._services

    @property
    def next_retry(self) -> float | None:
        """The time of the next retry, or None if no Service is quarantined."""
        return min((each.retry_at for each in self._services.values()), default=None)

    def due(self, now: float) -> list[ServiceKey]:
        """Return the Services whose retry is due."""
        return [key for key, each in self._services.items() if each.retry_at <= now]

    def update(
        self,
        covered: Collection[ServiceKey],
        rejected: Mapping[ServiceKey, str],
        now: float,
        *,
        changed: Collection[ServiceKey] = (),
        deleted: Collection[ServiceKey] = (),
    ) -> tuple[ConditionTransition, ...]:
        """Record which of the Services that a sync `covered` the kernel `rejected`, and return the transitions.

        `rejected` maps each rejected Service to the reason. `changed` are the Services that have changed since they
        were last tried: their delay starts again. The end of a quarantine is not reported for `deleted` Services.
        """
        return tuple(self._update(covered, rejected, now, changed, deleted))

    def _update(
        self,
        covered: Collection[ServiceKey],
        rejected: Mapping[ServiceKey, str],
        now: float,
        changed: Collection[ServiceKey],
        deleted: Collection[ServiceKey],
    ) -> Iterator[ConditionTransition]:
        name = self._family.value
        for key in [key for key in self._services if key in covered and key not in rejected]:
            del self._services[key]
            if key not in deleted:
                text = f"{name}: Service {key} is no longer quarantined: the kernel accepted its rules"
                yield ConditionTransition(key, "QuarantineEnded", text)
        for key, reason in rejected.items():
            before = self._services.get(key)
            if before is None or key in changed:
                delay = FIRST_RETRY_SECONDS
            else:
                delay = min(2 * before.delay, MAX_RETRY_SECONDS)
            self._services[key] = QuarantinedService(reason, now + delay, delay)
            if before is None or _without_position(before.reason) != _without_position(reason):
                text = f"{name}: Service {key} is quarantined: the kernel rejected its rules: {reason}"
                yield ConditionTransition(key, "Quarantined", text)


def _without_position(reason: str) -> str:
    return _LINE_NUMBER.sub("line", reason)
