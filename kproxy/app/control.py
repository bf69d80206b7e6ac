"""What the daemon answers on its control socket."""

from __future__ import annotations

import logging
import os
import resource
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy import __version__
from kproxy.model.addresses import family_of
from kproxy.model.daemon_status import (
    MAX_NAMES,
    DaemonStatus,
    FamilyStatus,
    NamedService,
    RepairSummary,
    ServiceSummary,
    SourceStatus,
)
from kproxy.model.object_page import ObjectPage, make_page
from kproxy.model.service_state import FamilyServiceState, FamilyWaiting, ServiceState
from kproxy.model.store import Store
from kproxy.model.sync_report import RepairReport, SyncReport
from kproxy.model.types import Family, ServiceKey
from kproxy.sync.family_sync import FamilySync

SERVICES_AT_ONCE = 1000
"""How many Services are counted while the store is locked."""
KEPT_REPAIRS = 10
"""The number of repairs of each family that a status describes."""


class FamilyRecord(Struct):
    """What happened in one family so far. Times are those of the reconciler's clock, in seconds."""

    last_success: float | None = None
    last_seconds: float = 0.0
    failures: int = 0
    failure: str = ""
    failing_since: float = 0.0
    waiting_since: float | None = None
    summary: ServiceSummary = ServiceSummary()
    repairs: int = 0
    last_repairs: deque[tuple[float, tuple[str, ...], tuple[str, ...]]] = field(
        default_factory=lambda: deque(maxlen=KEPT_REPAIRS)
    )


class DaemonLog(Protocol):
    """The log of this process."""

    def lines(self) -> Sequence[str]:
        """Return the latest lines, oldest first."""

    def set_verbosity(self, verbosity: int) -> None:
        """Change the verbosity of all source files."""


class ObjectOrigin(Struct, frozen=True):
    """Where the objects come from, the age of the last message about each kind in seconds, and any problem."""

    text: str
    ages: Mapping[str, float]
    problem: str


class DaemonControl:
    """Answers requests about the daemon (implements `kproxy.serve.control.Control`).

    The reconciler calls the listeners `on_queue`, `on_sync` and `on_repair`. All other methods may run in any thread:
    they read the store with its lock, and single values of the other objects.
    """

    def __init__(
        self,
        store: Store,
        families: Mapping[Family, FamilySync],
        *,
        mode: str,
        node_name: str,
        node_problem: Callable[[], str],
        healthy: Callable[[], Mapping[Family, bool]],
        findings: Callable[[Family], Collection[str]],
        origin: Callable[[], ObjectOrigin],
        configuration: Mapping[str, object],
        log: DaemonLog,
        dispatch_threshold: int,
        verbosity: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._families = families
        self._mode = mode
        self._node_name = node_name
        self._node_problem = node_problem
        self._healthy = healthy
        self._findings = findings
        self._origin = origin
        self._configuration = configuration
        self._log = log
        self._dispatch_threshold = dispatch_threshold
        self._verbosity = verbosity
        self._clock = clock
        self._started = clock()
        self._records = {family: FamilyRecord() for family in families}

    # Listeners

    def on_queue(self, family: Family, now: float) -> None:
        """Record since when a change has been waiting."""
        record = self._records[family]
        if record.waiting_since is None:
            record.waiting_since = now

    def on_sync(self, report: SyncReport) -> None:
        """Record the outcome of a sync."""
        record = self._records[report.family]
        record.last_seconds = report.finished - report.started
        if report.result is None:
            if not record.failure:
                record.failing_since = report.finished
            record.failures += 1
            record.failure = report.error
            return
        counts = report.result.counts
        record.failure = ""
        record.last_success = report.finished
        record.waiting_since = None
        record.summary = ServiceSummary(
            without_endpoints=counts.without_endpoints,
            dropped_by_local_policy=counts.dropped,
            in_conflict=counts.in_conflict,
            quarantined=counts.quarantined,
            invalid=counts.invalid,
            ignored=counts.ignored,
        )

    def on_repair(self, report: RepairReport) -> None:
        """Record what other processes had changed."""
        record = self._records[report.family]
        if report.result.repaired or report.result.needs_full_sync:
            record.repairs += 1
            parts = Counter(part.text for part in report.result.repaired) or {"all rules": 1}
            record.last_repairs.append((self._clock(), tuple(parts)[:KEPT_REPAIRS], report.by))

    # Requests

    def status(self) -> DaemonStatus:
        """Return the state of the daemon."""
        now = self._clock()
        origin = self._origin()
        with self._store.lock:
            complete = self._store.complete
        services = self._count_services()
        healthy = self._healthy()
        return DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            mode=self._mode,
            node=self._node_name,
            node_problem=self._node_problem(),
            up_seconds=now - self._started,
            verbosity=self._verbosity,
            memory_bytes=_resident_bytes(),
            objects=SourceStatus(
                source=origin.text,
                complete=complete,
                contact_seconds_ago=dict(origin.ages),
                problem=origin.problem,
            ),
            families=tuple(self._family_status(family, services[family], healthy, now) for family in self._families),
        )

    def _count_services(self) -> Counter[Family]:
        """Return the number of Services that have a ClusterIP of each family."""
        with self._store.lock:
            keys = list(self._store.service_keys())
        counts: Counter[Family] = Counter()
        for begin in range(0, len(keys), SERVICES_AT_ONCE):
            with self._store.lock:
                found = [self._store.service(key) for key in keys[begin : begin + SERVICES_AT_ONCE]]
            counts.update(family_of(ip) for each in found if each is not None for ip in each.cluster_ips)
        return counts

    def _family_status(self, family: Family, services: int, healthy: Mapping[Family, bool], now: float) -> FamilyStatus:
        record, sync = self._records[family], self._families[family]
        with self._store.lock:
            pending = len(sync.pending_services())
        summary = record.summary
        programmed = max(0, services - summary.quarantined) if record.last_success is not None else 0
        waiting = record.waiting_since
        return FamilyStatus(
            family=family.value,
            healthy=healthy.get(family, False),
            last_success_seconds_ago=None if record.last_success is None else now - record.last_success,
            last_sync_seconds=record.last_seconds,
            pending=pending,
            waiting_seconds=0.0 if waiting is None or not pending else now - waiting,
            failures=record.failures,
            failure=record.failure,
            services=replace(summary, programmed=programmed),
            problems=tuple(self._problems(sync)),
            repairs=record.repairs,
            last_repairs=tuple(
                RepairSummary(seconds_ago=now - when, parts=parts, by=by)
                for when, parts, by in list(record.last_repairs)
            ),
            findings=tuple(sorted(self._findings(family))),
        )

    def _problems(self, sync: FamilySync) -> Iterator[NamedService]:
        quarantined = sync.quarantined_services()
        for key in list(quarantined)[:MAX_NAMES]:
            yield NamedService(service=key, problem=f"quarantined: {quarantined[key]}")
        for key, problem in list(sync.service_problems().items())[: MAX_NAMES - min(MAX_NAMES, len(quarantined))]:
            yield NamedService(service=key, problem=problem)

    def service_names(self) -> Sequence[ServiceKey]:
        """Return the keys of all Services."""
        with self._store.lock:
            return sorted(self._store.service_keys())

    def service(self, key: ServiceKey) -> ServiceState:
        """Return the state of one Service."""
        with self._store.lock:
            service, slices = self._store.service(key), self._store.slices(key)
            families = {}
            for family, sync in self._families.items():
                record = self._records[family]
                families[family] = FamilyServiceState(
                    context=sync.applied_context,
                    pending=key in sync.pending_services(),
                    quarantined=sync.quarantined_services().get(key, ""),
                    failure=record.failure,
                    failing_seconds=self._clock() - record.failing_since if record.failure else 0.0,
                )
            return ServiceState(
                key=key,
                mode=self._mode,
                node_name=self._node_name,
                node=self._store.node,
                complete=self._store.complete,
                service=service,
                invalid=self._store.is_invalid(key),
                slices=tuple(slices),
                families=families,
                iptables_dispatch_threshold=self._dispatch_threshold,
            )

    def waiting(self) -> dict[Family, FamilyWaiting]:
        """Return the Services that the kernel does not have as they are."""
        with self._store.lock:
            return {
                family: FamilyWaiting(tuple(sync.pending_services()), sync.quarantined_services())
                for family, sync in self._families.items()
            }

    def objects(self, start: str) -> ObjectPage:
        """Return a page of the objects, in the order of their names. See `make_page` for `start`."""
        with self._store.lock:
            return make_page(self._store, start)

    def configuration(self) -> Mapping[str, object]:
        """Return the configuration in use, as the content of a configuration file."""
        return self._configuration

    def log_lines(self) -> Sequence[str]:
        """Return the latest lines of the log, oldest first."""
        return self._log.lines()

    def set_verbosity(self, verbosity: int) -> None:
        """Change the log verbosity until the process ends."""
        logging.getLogger(__name__).info("log verbosity: %d instead of %d", verbosity, self._verbosity)
        self._verbosity = verbosity
        self._log.set_verbosity(verbosity)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
