"""The daemon's wiring: sources, reconciler, threads and signals."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from kproxy.config import Config
from kproxy.contexts import is_known
from kproxy.families import StartError, follows_addresses, make_families, this_node
from kproxy.host.monitor import AddressMonitor
from kproxy.host.run import CommandError
from kproxy.kube.client import Client, ClientError
from kproxy.kube.file_source import FileSource
from kproxy.model.store import Store
from kproxy.model.types import Family
from kproxy.nftables.cleanup import remove_table
from kproxy.sync.reconciler import Message, Reconciler, Resync, Stop
from kproxy.sync.report import SyncReport
from kproxy.sync.schedule import Schedule

log = logging.getLogger(__name__)

STOP_SECONDS = 0.7
"""How long a termination waits for a sync under way; after that the process just ends, and the rules are whole."""


class Part(Protocol):
    """Something that runs beside the reconciler."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End; nothing more comes from it afterwards."""


def run(config: Config, objects: str | None, server: str | None) -> None:
    """Keep this node's rules after the cluster until SIGTERM or SIGINT; the rules stay.

    `objects` is a file or folder to follow instead of an API server, `server` overrides the URL of that. Raises
    `StartError` if it cannot begin.
    """
    Daemon(config, objects, server).run()


class Daemon:
    """All parts of one daemon, and how they are connected.

    Sources and monitors only put messages on a queue; the reconciler's thread takes them off it and owns all state.
    """

    def __init__(self, config: Config, objects: str | None, server: str | None) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._parts: list[Part] = []
        name = this_node(config)
        families = make_families(config)
        if objects is not None:
            self._parts.append(FileSource(objects, self._messages.put))
        else:
            self._parts.append(_api_source(config, name, server, self._messages.put))
        if follows_addresses(config):
            self._parts.append(AddressMonitor(lambda: self._messages.put(Resync())))
        periods = config.backend
        self._reconciler = Reconciler(
            Store(name),
            families,
            make_schedule=lambda: Schedule(min_interval=periods.min_sync_period, max_retry=periods.sync_period),
            clock=time.monotonic,
            is_ready=lambda store: is_known(config, store),
            observers=[OtherMode()],
        )

    def run(self) -> None:
        """Work until a signal comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._terminate)
        worker = threading.Thread(target=self._reconcile, name="reconciler", daemon=True)
        worker.start()
        for part in self._parts:
            part.start()
        self._ended.wait()
        self._messages.put(Stop())
        worker.join(STOP_SECONDS)
        # What else runs are daemon threads that hold nothing worth saving. A transaction under way is whole in any
        # case: iptables-restore has read all of it and completes it without us, or has not and drops it.
        logging.shutdown()
        if worker.is_alive():
            os._exit(0)

    def _reconcile(self) -> None:
        try:
            self._reconciler.run(self._messages)
        finally:
            self._ended.set()

    def _terminate(self, number: int, _frame: FrameType | None) -> None:
        log.info("%s: stopping, the rules stay", signal.Signals(number).name)
        self._ended.set()


class OtherMode:
    """An observer that removes what nftables mode left behind, once our own rules are in place."""

    def queued(self, family: Family, now: float) -> None:
        """Do nothing."""

    def __init__(self) -> None:
        self._done: set[Family] = set()

    def synced(self, report: SyncReport) -> None:
        """Remove the other mode's table of a family after that family's first success."""
        if report.error or report.family in self._done:
            return
        self._done.add(report.family)
        try:
            if remove_table(report.family):
                log.info("%s: removed what nftables mode had left", report.family.value)
        except CommandError as error:
            log.warning("%s: rules of nftables mode are still there beside ours: %s", report.family.value, error)


def _api_source(config: Config, name: str, server: str | None, put: Callable[[Message], None]) -> Part:
    from kproxy.kube.api_source import ApiSource  # noqa: PLC0415 - the API client's 35 MB only where it is used

    try:
        client = Client.from_config(config.client_connection.kubeconfig or None, server)
    except ClientError as error:
        raise StartError(str(error)) from None
    return ApiSource(client, name, put)
