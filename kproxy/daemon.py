"""The only wiring: configuration to sources, reconciler, backends, threads, signals and exit codes."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Protocol

from kproxy.config import Config, node_name
from kproxy.contexts import PRIMARY, make_context
from kproxy.host.addresses import local_addresses
from kproxy.host.run import CommandError
from kproxy.iptables.apply import Iptables
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED, IptablesBackend, Printer
from kproxy.kube.client import Client, ClientError
from kproxy.kube.file_source import FileSource, FileSourceError
from kproxy.model.context import Context
from kproxy.model.delta import Delta
from kproxy.model.store import Store
from kproxy.model.types import Family, Node
from kproxy.node import IptablesNode, discover_iptables
from kproxy.sync.backend import SyncError
from kproxy.sync.family import FamilySync
from kproxy.sync.reconciler import Message, Reconciler, Stop
from kproxy.sync.schedule import Schedule

log = logging.getLogger(__name__)

STOP_SECONDS = 0.7
"""How long a termination waits for a sync under way; after that the process just ends, and the rules are whole."""


class Source(Protocol):
    """Where objects come from."""

    def start(self) -> None:
        """Begin to hand on deltas."""

    def stop(self) -> None:
        """Stop handing on deltas."""


class StartError(Exception):
    """kproxy cannot work here; the message says why on one line."""


def this_node(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or the machine's host name."""
    return node_name(config, socket.gethostname())


def make_families(config: Config, name: str, node: IptablesNode) -> dict[Family, FamilySync]:
    """Return the way to the kernel for each family that works here."""
    families = {}
    for family, version in node.versions.items():
        log.info("%s: %s", family.value, version)
        backend = IptablesBackend(Iptables(family), block_rules=BLOCK_RULES if version.nft else UNLIMITED)
        context = partial(_context, config, family, name, accounting=node.accounting, random_fully=version.random_fully)
        families[family] = FamilySync(backend, context)
    return families


def _context(
    config: Config, family: Family, name: str, node: Node | None, *, accounting: bool, random_fully: bool
) -> Context:
    needs_addresses = config.node_port_addresses not in {(), PRIMARY}
    addresses = local_addresses() if needs_addresses else ()
    return make_context(config, family, name, node, addresses, accounting=accounting, random_fully=random_fully)


def apply_once(config: Config, objects: str) -> None:
    """Program the objects of a file or folder. Raises `StartError`, `FileSourceError` or `SyncError`.

    Each family is tried even if the other fails.
    """
    families = make_families(config, this_node(config), _discover())
    store = load_store(config, objects)
    failures = []
    for family, sync in families.items():
        try:
            outcome = sync.sync(store)
        except SyncError as error:
            failures.append(f"{family.value}: {error}")
        else:
            log.info("%s: %d services in force", family.value, len(outcome.plans))
    if failures:
        raise SyncError("; ".join(failures))


def render(config: Config, objects: str) -> dict[Family, str]:
    """Return the rules for the objects of a file or folder, as restore input for an empty kernel.

    Raises `FileSourceError`. Looks at nothing of this machine but its host name.
    """
    store = load_store(config, objects)
    texts = {}
    for family in Family:
        pages: list[str] = []
        FamilySync(Printer(pages.append), _ideal_context(config, family)).sync(store)
        texts[family] = "".join(pages)
    return texts


def _ideal_context(config: Config, family: Family) -> Callable[[Node | None], Context]:
    """Return how contexts are made for a node where everything works, with the addresses that its Node names."""

    def context(node: Node | None) -> Context:
        addresses = node.addresses if node else ()
        return make_context(config, family, this_node(config), node, addresses, accounting=True, random_fully=True)

    return context


def load_store(config: Config, objects: str) -> Store:
    """Return the desired state that a file or folder holds. Raises `FileSourceError`."""
    store = Store(this_node(config))

    def take(deltas: tuple[Delta, ...]) -> None:
        for delta in deltas:
            store.apply(delta)

    FileSource(objects, take).load_once()
    if store.node is None:
        log.warning("there is no Node %r: zone, pod CIDRs and node addresses are unknown", this_node(config))
    return store


def run(config: Config, objects: str | None) -> None:
    """Keep this node's rules after the cluster until SIGTERM or SIGINT; the rules stay.

    Raises `StartError` if it cannot begin.
    """
    name = this_node(config)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    source = _source(config, name, objects, messages.put)
    families = make_families(config, name, _discover())
    settings = config.iptables
    reconciler = Reconciler(
        Store(name),
        families,
        make_schedule=lambda: Schedule(min_interval=settings.min_sync_period, max_retry=settings.sync_period),
        clock=time.monotonic,
    )
    ended = threading.Event()

    def work() -> None:
        try:
            reconciler.run(messages)
        finally:
            ended.set()

    def terminate(number: int, _frame: FrameType | None) -> None:
        log.info("%s: stopping, the rules stay", signal.Signals(number).name)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, terminate)
    worker = threading.Thread(target=work, name="reconciler", daemon=True)
    worker.start()
    source.start()
    ended.wait()
    messages.put(Stop())
    worker.join(STOP_SECONDS)
    if worker.is_alive():
        # A transaction that iptables-restore has read completes without us, one that it has not is void.
        logging.shutdown()
        os._exit(0)
    source.stop()


def _discover() -> IptablesNode:
    try:
        return discover_iptables()
    except CommandError as error:
        raise StartError(f"iptables mode does not work here: {error}") from None


def _source(config: Config, name: str, objects: str | None, put: Callable[[Message], None]) -> Source:
    if objects is not None:
        return FileSource(objects, put)
    from kproxy.kube.api_source import ApiSource  # noqa: PLC0415 - the API client's 35 MB only where it is used

    connection = config.client_connection
    try:
        client = Client.from_config(kubeconfig=connection.kubeconfig or None)
    except ClientError as error:
        raise StartError(str(error)) from None
    return ApiSource(client, name, put)


__all__ = ["FileSourceError", "StartError", "SyncError", "apply_once", "load_store", "render", "run", "this_node"]
