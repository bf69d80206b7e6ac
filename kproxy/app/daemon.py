"""The daemon: create and connect its parts, start and stop them, handle signals."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from kproxy.app.backends import StartError, check_privileges, make_families, probe_family
from kproxy.app.control import DaemonControl, DaemonLog, ObjectOrigin
from kproxy.app.family_contexts import is_ready
from kproxy.app.first_sync import FirstSyncSteps
from kproxy.app.kernel_parameters import prepare_conntrack, prepare_process
from kproxy.app.localhost_node_ports import wants_localhost_proxy
from kproxy.app.node_port_addresses import depends_on_interfaces
from kproxy.app.node_settings import local_node_name, watched_kinds
from kproxy.app.own_commits import OwnCommits
from kproxy.app.skipped_families import SkippedFamilies
from kproxy.config import Config, as_document
from kproxy.config.validation import default_mode_warning
from kproxy.host.ctnetlink import UdpConntrack
from kproxy.host.heap import release_unused_memory
from kproxy.host.interfaces import AddressMonitor, own_addresses
from kproxy.host.nf_tables_events import RulesWatch
from kproxy.host.nfacct import read_counter
from kproxy.host.signals import HANDLED_SIGNALS, STACK_DUMP_SIGNALS, STOP_SIGNALS, block_signals
from kproxy.iptables.legacy_poll import LegacyPoll
from kproxy.iptables.names import INVALID_COUNTER, LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner
from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from kproxy.kube.events.correlator import node_reference, object_reference, service_reference
from kproxy.kube.events.recorder import EventRecorder, EventSink, NullRecorder
from kproxy.kube.listwatch.api_source import ApiSource
from kproxy.model.delta import Kind
from kproxy.model.localhost_node_ports import DRAIN_SECONDS
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family, Node, ServiceKey
from kproxy.nftables.rejected_packets import rejected_packets
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, LocalhostNodePorts
from kproxy.serve.status_server import ListenError, StatusServer
from kproxy.sync.conntrack_cleanup import ConntrackCleaner
from kproxy.sync.drift_listener import DriftListener
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.family_worker import FamilyWorker
from kproxy.sync.node_monitor import NodeMonitor
from kproxy.sync.reconciler import Message, Reconciler, Resync, Stop
from kproxy.sync.schedule import Schedule
from kproxy.sync.service_events import ServiceEventListener

if TYPE_CHECKING:
    from kproxy.serve.localhost_proxy import LocalhostProxy

MANY_SERVICES = 1000
"""With at least so many Services, a sync needs megabytes of memory."""
log = logging.getLogger(__name__)

STOP_SECONDS = 0.7
"""Seconds to wait for a sync in progress when stopping. After that, running iptables programs are killed."""

PART_STOP_SECONDS = 0.1
"""Seconds to wait for each component to stop. This is enough for components that are not waiting for the API server."""

EXIT_SECONDS = 0.3
"""Seconds to wait, after killing iptables programs, for the reconciler thread to stop the components."""

LIVENESS_SECONDS = 30.0
"""Seconds between two checks whether the reconciler's thread is alive."""

FULL_CHECK_SECONDS = 3600.0
"""Seconds between full drift checks. kube-proxy rewrites all rules at the same interval."""


class Component(Protocol):
    """A part of the daemon that has its own daemon threads."""

    def start(self) -> None:
        """Start the threads."""

    def stop(self, timeout: float) -> None:
        """Stop the threads and wait at most `timeout` seconds for them to exit."""


class ObjectSource(Component, Protocol):
    """The component that delivers the objects."""

    def ages(self) -> dict[str, float]:
        """Return the seconds since the last message about each kind of object, if it comes from the API server."""

    def status(self) -> dict[str, object]:
        """Return fields for `/healthz` and `/livez`: whether the objects may be outdated, and why. Thread-safe."""


class ConfigFile(Struct, frozen=True):
    """The file that the configuration was read from, its content, and a function that loads new content."""

    path: str
    content: bytes
    load: Callable[[bytes], tuple[Config, list[str]]]


class RestartNeededError(Exception):
    """The process must be restarted: the configuration has changed, or a skipped IP family works now."""


def run(
    config: Config,
    *,
    objects: str | None,
    server: str | None,
    file: ConfigFile | None,
    flags: Callable[[], Mapping[str, str]],
    own_log: DaemonLog,
) -> None:
    """Keep this node's rules in sync with the cluster until SIGTERM or SIGINT. The rules stay active afterwards.

    `objects` is a file or directory to watch instead of an API server, `server` overrides the API server's URL, `file`
    is the configuration file to watch, `flags` returns the values for `/flagz`, and `own_log` is the log of this
    process. Raises `StartError` or
    `ListenError` if the daemon cannot start, `RestartNeededError` when the configuration changes or an IP family that
    was skipped works, and `RuntimeError` if a thread fails.
    """
    Daemon(config, objects, server, file, flags, own_log=own_log).run()


class Daemon:
    """The parts of one daemon and their connections.

    The reconciler's thread creates the parts, starts them in order, runs until it receives a `Stop` message, and stops
    them in reverse order. It owns the desired state and the schedules: sources, monitors and families only put messages
    on its queue. The thread of a family owns what kproxy knows about the kernel's rules of this family, and runs the
    programs that change them. The main thread only waits for signals, so that it handles them at once even if every
    other thread is blocked.
    """

    def __init__(
        self,
        config: Config,
        objects: str | None,
        server: str | None,
        file: ConfigFile | None,
        flags: Callable[[], Mapping[str, str]] = dict,
        *,
        own_log: DaemonLog,
    ) -> None:
        self._config = self._loaded = config
        self._own_log = own_log
        self._flags = flags
        self._file = file
        self._objects = objects
        self._server = server
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._programs: list[IptablesRunner] = []
        self._first_sync: FirstSyncSteps | None = None
        self._programs_stopped = threading.Event()
        self._failure: BaseException | None = None
        self._source: ObjectSource | None = None
        self._localhost: LocalhostProxy | None = None

    def run(self) -> None:
        """Run until SIGTERM or SIGINT arrives, a thread fails, or the process must be restarted.

        Raises the same errors as the function `run` of this module.
        """
        # Block the signals before any other thread exists, so that only sigwait receives them, even as PID 1.
        block_signals()
        threading.excepthook = self._thread_failed
        reconciler = threading.Thread(target=self._work, name="reconciler", daemon=True)
        reconciler.start()
        number = _wait_for_stop(reconciler)
        if number is None:
            self._failure = self._failure or RuntimeError(f"thread {reconciler.name} has ended unexpectedly")
        elif self._failure is None:
            log.info("%s: stopping; existing rules stay active", number.name)
        self._stop(reconciler)
        if self._failure is not None:  # set before `_stop` was called, or while it ran
            raise self._failure

    def _stop(self, reconciler: threading.Thread) -> None:
        """Stop the reconciler's thread and, through it, all parts, within about a second.

        A thread that is still running after that is waiting for the kernel, a program or the API server, and has no
        state to save. Python does not wait for daemon threads at exit, so the process exits normally: it flushes the
        log and removes the temporary files of the `kubernetes` package, which contain private keys.
        """
        deadline = time.monotonic() + DRAIN_SECONDS
        if self._localhost is not None:
            self._localhost.drain()
        self._messages.put(Stop())
        reconciler.join(STOP_SECONDS)
        self._programs_stopped.set()
        for iptables in self._programs:
            iptables.stop()
        if self._first_sync is not None:
            self._first_sync.stop()
        reconciler.join(EXIT_SECONDS)
        if self._localhost is not None:
            self._localhost.stop(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        with ExitStack() as parts:
            self._build(parts).run(self._messages)

    def _start(self, parts: ExitStack, part: Component) -> None:
        """Start a component and register it with `parts` to be stopped. Raises `StartError` if threads cannot start."""
        parts.callback(part.stop, PART_STOP_SECONDS)
        try:
            part.start()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "start new thread" in str(error):
                raise StartError(f"cannot start a thread: {error or 'out of memory'}") from None
            raise

    def _build(self, parts: ExitStack) -> Reconciler:
        """Create, connect and start all parts.

        The steps that are likely to fail run first, before kproxy changes the node by setting kernel parameters.
        """
        check_privileges()
        client = None if self._objects is not None else _connect(self._config, self._server)
        config = self._config
        if warning := default_mode_warning(config):
            log.warning("%s", warning)
        own_commits = OwnCommits()
        self._localhost = localhost = _localhost_proxy(config)
        families = make_families(
            config,
            self._programs,
            own_commits,
            lambda family: serving.on_progress(family),  # noqa: PLW0108 - `serving` is created later
            localhost,
        )
        name = local_node_name(config)
        store = Store(name, watched_kinds(config), lock=threading.RLock())
        control = self._control(
            store,
            families,
            name,
            healthy=lambda: serving.healthy(),  # noqa: PLW0108 - `serving` is created later
            reason=lambda: watch.reason,
            findings=lambda family: drift.findings(family),  # noqa: PLW0108 - as above
        )
        workers = {family: FamilyWorker(f"sync-{family.value.lower()}") for family in families}
        events = self._events(client, name)
        drift = DriftListener(partial(_node_event, events, name))
        serving = self._serving(families, store, events, control, reason=lambda: watch.reason)
        serving.metrics.track_invalid_services(lambda: store.invalid_services)
        serving.metrics.track_invalid_endpoints(lambda: store.invalid_endpoints)
        if limit := config.kproxy.service_connection_metrics:
            from kproxy.app.connection_counts import ScrapedConnections, read_counts_of  # noqa: PLC0415 - rarely used

            read = partial(read_counts_of, config.effective_mode, tuple(families))
            serving.metrics.track_service_connections(ScrapedConnections(limit, read))
        if config.effective_mode == "nftables":
            serving.metrics.track_localhost_node_ports(partial(_localhost_state, tuple(families), config, localhost))
        watch = NodeMonitor(
            name,
            required=client is not None,  # files need not contain Nodes
            needs_pod_cidrs=config.detect_local_mode == "NodeCIDR",
            on_missing=serving.metrics.set_node_missing,
        )
        if client is not None:
            client.observe_request = serving.metrics.on_request
        conntrack = ConntrackCleaner(
            {family: UdpConntrack(family) for family in families},
            own_addresses,
            clock=time.monotonic,
            on_cleanup=lambda done: serving.metrics.conntrack_reconciled(done.family, done.seconds, done.deleted),
        )
        self._first_sync = first_sync = FirstSyncSteps(config, families)
        self._start(parts, serving)
        if localhost is not None:
            self._start(parts, localhost)
        prepare_process(config)
        prepare_conntrack(config)
        rules_watch = self._rules_watch(own_commits)
        watches = () if rules_watch is None else (rules_watch,)
        self._source = self._object_source(client, name, serving, events)
        watches_and_workers = (*watches, *self._legacy_polls(), *workers.values())
        for part in (*watches_and_workers, events, self._source, *self._monitors(families)):
            self._start(parts, part)
        periods = config.backend
        return Reconciler(
            store,
            families,
            make_schedule=lambda: Schedule(min_interval=periods.min_sync_period, max_retry=periods.sync_period),
            clock=time.monotonic,
            is_ready=lambda store: is_ready(config, store),
            on_queue=[*serving.on_queue, control.on_queue],
            on_change=serving.on_change,
            on_sync=[
                *serving.on_sync,
                control.on_sync,
                ServiceEventListener(partial(_service_event, events)).on_sync,
                *(each.on_sync for each in watches),
            ],
            on_repair=[*serving.on_repair, control.on_repair, drift.on_repair],
            after_sync=[conntrack.clean, first_sync.run, _release_memory],
            check_interval=periods.sync_period,
            full_check_interval=FULL_CHECK_SECONDS,
            monitor=watch.check,
            programs_stopped=self._programs_stopped.is_set,
            execute=lambda family, job: workers[family].submit(partial(job, self._messages.put)),
        )

    def _rules_watch(self, own: OwnCommits) -> RulesWatch | None:
        if not own.tables:
            return None  # iptables-legacy
        return RulesWatch(
            own.tables,
            self._messages.put,
            is_own_port=own.owns,
            is_own_commit=own.confirms,
            newest_own_generation=own.generations.newest_after,
            # The generation IDs of commits that iptables programs make are unknown.
            after_first_syncs=self._config.effective_mode == "nftables",
        )

    def _legacy_polls(self) -> Iterator[Component]:
        legacy = {iptables.family: iptables for iptables in self._programs if not iptables.version().nft}
        if legacy:
            yield LegacyPoll(legacy, self._messages.put)

    def _object_source(
        self, client: ApiClient | None, name: str, serving: StatusServer, events: EventSink
    ) -> ObjectSource:
        if client is None:
            from kproxy.kube.manifests.file_source import FileSource  # noqa: PLC0415 - costs memory, and few daemons read files

            assert self._objects is not None
            return FileSource(self._objects, self._messages.put)

        def on_invalid(kind: Kind, namespace: str, of: str, text: str) -> None:
            events.event(object_reference(kind, namespace, of, name), "Warning", "InvalidObject", "Decode", text)

        source = ApiSource(
            client,
            name,
            self._messages.put,
            kinds=watched_kinds(self._config),
            max_page_bytes=self._config.kproxy.max_list_page_bytes,
            max_event_bytes=self._config.kproxy.max_watch_event_bytes,
            on_error=serving.metrics.on_reflector_error,
            on_invalid=on_invalid,
        )
        serving.metrics.track_api(source.ages)
        return source

    def _origin(self) -> ObjectOrigin:
        text = f"files in {self._objects}" if self._objects is not None else "API server"
        problem = ", ".join(f"{name}: {value}" for name, value in self._source_status().items())
        return ObjectOrigin(text, self._source.ages() if self._source is not None else {}, problem)

    def _source_status(self) -> dict[str, object]:
        return self._source.status() if self._source is not None else {}

    def _monitors(self, families: Collection[Family]) -> Iterator[Component]:
        if skipped := [family for family in Family if family not in families]:
            yield SkippedFamilies(skipped, partial(probe_family, self._config.effective_mode), self._family_works)
        if depends_on_interfaces(self._config):
            yield AddressMonitor(lambda: self._messages.put(Resync()))
        if self._file is not None:
            from kproxy.config.reload import ConfigWatcher  # noqa: PLC0415 - as above

            file = self._file
            yield ConfigWatcher(file.path, file.content, self._loaded, file.load, self._config_changed)

    def _events(self, client: ApiClient | None, name: str) -> EventRecorder | NullRecorder:
        if client is None:
            return NullRecorder()
        events = EventRecorder(client, name, clock=time.monotonic, wall=time.time_ns)
        events.event(node_reference(name), "Normal", "Starting", "StartKubeProxy", "")
        if warning := default_mode_warning(self._config):
            events.event(node_reference(name), "Warning", "ProxyModeNotSet", "StartKubeProxy", warning)
        return events

    def _serving(
        self,
        families: Iterable[Family],
        store: Store,
        events: EventSink,
        control: DaemonControl,
        *,
        reason: Callable[[], str],
    ) -> StatusServer:
        config = self._config
        # Files need not contain this Node. If they do not, assume that it exists and is not being deleted.
        stand_in = Node(local_node_name(config)) if self._objects is not None else None

        def on_port_failed(service: ServiceKey, port: int, reason: str) -> None:
            note = f"cannot serve the health check node port {port}: {reason}"
            events.event(service_reference(service), "Warning", "FailedToStartServiceHealthcheck", "Listen", note)

        return StatusServer(
            families,
            mode=config.effective_mode,
            configuration=as_document(config),
            healthz_address=config.healthz_bind_address,
            metrics_address=config.metrics_bind_address,
            hard_fail=config.bind_address_hard_fail,
            health_timeout=2 * config.backend.sync_period,
            node=lambda: store.node or stand_in,
            counters={
                INVALID_DROPPED: partial(read_counter, INVALID_COUNTER),
                LOCALHOST_ACCEPTED: partial(read_counter, LOCALHOST_COUNTER),
            },
            on_port_failed=on_port_failed,
            clock=time.monotonic,
            wall=time.time_ns,
            reason=reason,
            sources=self._source_status,
            flags=self._flags,
            control=control if config.kproxy.control_socket else None,
        )

    def _control(
        self,
        store: Store,
        families: Mapping[Family, FamilySync],
        name: str,
        *,
        healthy: Callable[[], Mapping[Family, bool]],
        reason: Callable[[], str],
        findings: Callable[[Family], Collection[str]],
    ) -> DaemonControl:
        return DaemonControl(
            store,
            families,
            mode=self._config.effective_mode,
            node_name=name,
            node_problem=reason,
            healthy=healthy,
            findings=findings,
            origin=self._origin,
            configuration=as_document(self._config),
            log=self._own_log,
            dispatch_threshold=self._config.kproxy.iptables_dispatch_threshold,
            verbosity=self._config.logging.verbosity,
            clock=time.monotonic,
        )

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Stop the process when one of its threads fails.

        With a dead thread, the process could otherwise keep running and appear healthy.
        """
        try:
            self._report_failure(failed)
        except MemoryError:
            os._exit(1)  # needs no memory

    def _report_failure(self, failed: threading.ExceptHookArgs) -> None:
        name = failed.thread.name if failed.thread else "unknown"
        log.debug("traceback of thread %s", name, exc_info=failed.exc_value)
        expected = isinstance(failed.exc_value, StartError | ListenError)
        self._fail(failed.exc_value if expected else RuntimeError(f"thread {name} failed: {failed.exc_value!r}"))

    def _config_changed(self) -> None:
        assert self._file is not None
        self._fail(RestartNeededError(f"{self._file.path} has changed: exiting to restart with the new configuration"))

    def _family_works(self, family: Family) -> None:
        self._fail(RestartNeededError(f"{family.value} works on this node now: exiting to restart with it"))

    def _fail(self, error: BaseException | None) -> None:
        self._failure = error
        os.kill(os.getpid(), signal.SIGTERM)


def _release_memory(report: SyncReport) -> None:
    """After a sync of many Services, return the memory that it needed (`kproxy.model.sync_report.AfterSyncStep`)."""
    if report.result is not None and report.result.services >= MANY_SERVICES:
        release_unused_memory()


def _localhost_proxy(config: Config) -> LocalhostProxy | None:
    """Return the proxy for NodePorts on loopback addresses if an IP family needs it."""
    if not any(wants_localhost_proxy(config, family) for family in Family):
        return None
    from kproxy.serve.localhost_proxy import LocalhostProxy  # noqa: PLC0415 - rarely used

    return LocalhostProxy(time.monotonic)


def _localhost_state(
    families: Iterable[Family], config: Config, proxy: LocalhostProxy | None
) -> dict[Family, LocalhostNodePorts]:
    found = {}
    for family in families:
        rejected = rejected_packets(family)
        if proxy is not None and wants_localhost_proxy(config, family):
            found[family] = LocalhostNodePorts(rejected, proxy.listening(family), proxy.failures(family))
        else:
            found[family] = LocalhostNodePorts(rejected)
    return found


def _service_event(events: EventSink, service: ServiceKey, reason: str, note: str) -> None:
    events.event(service_reference(service), "Warning", reason, "SyncProxyRules", note)


def _node_event(events: EventSink, node: str, reason: str, note: str) -> None:
    events.event(node_reference(node), "Warning", reason, "SyncProxyRules", note)


def _wait_for_stop(reconciler: threading.Thread) -> signal.Signals | None:
    """Wait for a signal that stops the daemon, and return it. Handle other signals meanwhile.

    Without enough memory, Python may end a thread without calling `threading.excepthook`. If this happens to the
    reconciler's thread, return None.
    """
    while True:
        received = signal.sigtimedwait(HANDLED_SIGNALS, LIVENESS_SECONDS)
        if received is None:
            if not reconciler.is_alive():
                return None
            continue
        number = signal.Signals(received.si_signo)
        if number in STOP_SIGNALS:
            return number
        if number in STACK_DUMP_SIGNALS:
            log.info("%s: writing the stacks of all threads to stderr", number.name)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        else:
            log.info("%s: ignored; kproxy watches its configuration file and needs no signal", number.name)


def _connect(config: Config, server: str | None) -> ApiClient:
    try:
        return ApiClient.from_config(config.client_connection.kubeconfig or None, server)
    except ClientError as error:
        raise StartError(str(error)) from None
