"""A thread that reports changes that other processes make to nf_tables tables, as soon as they are committed."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Collection

from kproxy.host.netlink import NETLINK_NETFILTER, SO_RCVBUFFORCE
from kproxy.host.nf_tables import current_generation
from kproxy.host.nf_tables_constants import NFNLGRP_NFTABLES
from kproxy.host.nf_tables_notifications import CommitDecoder
from kproxy.model.drift import CommitAuthor, RulesChanged, Touched
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family

_RECEIVE_BUFFER = 32 << 20
"""Size of the receive buffer in bytes. It is enough for the deletion of a hundred thousand elements by one commit.

The kernel allocates memory only for notifications that wait in the buffer.
"""
_RECEIVE_SIZE = 1 << 16
FIRST_RETRY_SECONDS = 1.0
"""Seconds until the first attempt to watch again after an error. The delay doubles with each further error."""
MAX_RETRY_SECONDS = 60.0
"""Maximum number of seconds until the next attempt to watch."""
_OWN_COMMIT_SECONDS = 0.05
"""Seconds until a commit of this process that is being made is recorded."""
_OWN_COMMIT_CHECKS = 20
"""Maximum number of checks whether the current generation was committed by this process."""

log = logging.getLogger(__name__)


class RulesWatch:
    """Reports what other processes change in some tables of this network namespace.

    The watch has its own thread, which calls `on_change` once for all commits that arrive together. `on_change` must
    not block. Commits made by kproxy itself are not reported.

    If notifications are lost, the watch reports that everything in all tables may have changed, unless it can tell that
    only this process has made commits meanwhile. If the watch fails, it starts again, with increasing delays.
    """

    def __init__(
        self,
        tables: Collection[tuple[Family, str]],
        on_change: Callable[[RulesChanged], None],
        *,
        is_own_port: Callable[[int], bool],
        is_own_commit: Callable[[CommitAuthor], bool] = lambda _: True,
        newest_own_generation: Callable[[int], int] = lambda generation: generation,
        after_first_syncs: bool = False,
    ) -> None:
        """Create a watch that is not started yet.

        `is_own_port` returns whether a netlink port ID belongs to this process or to a program that it has just run.
        `is_own_commit` confirms that a commit with such a port ID was made by that process.
        `newest_own_generation` returns the newest generation ID that was reached from another one only by commits of
        this process.

        With `after_first_syncs`, the watch does not receive notifications before `on_sync` has been called for every
        family. The kernel then does not have to build notifications during the first syncs, which can change
        hundreds of thousands of elements. Other processes' commits during that time are found by their generation IDs.
        """
        self._tables = tuple(tables)
        self._awaited = {family for family, _ in tables} if after_first_syncs else set()
        self._on_change = on_change
        self._newest_own_generation = newest_own_generation
        self._decoder = CommitDecoder(self._tables, is_own_port, is_own_commit)
        # The generation ID up to which all changes have been reported; -1 if the watch failed before it knew one.
        self._known_generation: int | None = None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._begin = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rules-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        if not self._awaited:
            self._begin.set()
        self._thread.start()

    def on_sync(self, report: SyncReport) -> None:
        """Record that a sync of a family was attempted."""
        self._awaited.discard(report.family)
        if not self._awaited:
            self._begin.set()

    def stop(self, timeout: float) -> None:
        """Stop the thread, and wait at most `timeout` seconds for it."""
        self._stopping.set()
        self._begin.set()
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if not self._thread.is_alive():
            os.close(self._wakeup)

    def _run(self) -> None:
        delay = FIRST_RETRY_SECONDS
        while not self._stopping.is_set():
            try:
                if not self._begin.is_set():
                    self._known_generation = current_generation()
                    self._begin.wait()
                with _open_socket() as notifications:
                    self._check_missed(self._known_generation)
                    delay = FIRST_RETRY_SECONDS
                    self._watch(notifications)
            except Exception as error:  # the periodic comparison finds what the watch misses
                reason = error.strerror if isinstance(error, OSError) else f"unexpected {error!r}"
                if self._known_generation is None:
                    self._known_generation = -1
                log.warning("cannot watch for changes to nf_tables tables, retrying in %.0f s: %s", delay, reason)
                log.debug("cannot watch for changes to nf_tables tables", exc_info=error)
                self._stopping.wait(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)

    def _watch(self, notifications: socket.socket) -> None:
        poll = select.poll()
        poll.register(notifications, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while not self._stopping.is_set():
            poll.poll()
            self._receive(notifications)
            if (changed := self._decoder.take()) is not None:
                self._on_change(changed)

    def _receive(self, notifications: socket.socket) -> None:
        """Receive all pending notifications. If the kernel had to drop some, check whether that matters."""
        receive, feed = notifications.recv, self._decoder.feed
        lost = False
        known: int | None = None
        while True:
            try:
                feed(receive(_RECEIVE_SIZE))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # The kernel reports the loss before the notifications that it still has, from before and after it.
                if not lost:
                    lost, known = True, self._decoder.generation or self._known_generation
        if lost:
            self._check_missed(known)

    def _check_missed(self, known: int | None) -> None:
        """Report that everything may have changed since generation `known`, unless only this process has made commits.

        None means that nobody depends on notifications yet: the first syncs read the tables later.
        """
        has_foreign_changes = self._decoder.discard()
        current = self._known_generation = current_generation()
        if known is None:
            return
        for _ in range(0 if has_foreign_changes else _OWN_COMMIT_CHECKS):
            if self._newest_own_generation(known) == current:
                return
            if self._stopping.wait(_OWN_COMMIT_SECONDS):
                return
            current = self._known_generation = current_generation()
        log.info("notifications about nf_tables were lost; checking all of kproxy's rules")
        self._on_change(RulesChanged({table: Touched(everything=True) for table in self._tables}))


def _open_socket() -> socket.socket:
    """Return a nonblocking socket that receives the notifications. Raises `OSError`."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    try:
        try:
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        opened.bind((0, 1 << NFNLGRP_NFTABLES - 1))
        opened.setblocking(False)
    except OSError:
        opened.close()
        raise
    return opened
