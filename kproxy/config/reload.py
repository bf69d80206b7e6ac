"""Follow the configuration file, and tell edits that change the configuration from those that do not or are wrong."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from typing import TypeAlias

from kproxy.config.decode import ConfigError
from kproxy.config.types import Config
from kproxy.documents.watch import PathSnapshot, PathWatcher

RELOAD_PERIOD = 10.0
"""Seconds between looks at the file where the kernel gives no notice of changes."""
STOP_TIMEOUT = 1.0
"""Seconds that `ConfigWatcher.stop` waits for its thread, which takes longer only while `changed` does."""
Load: TypeAlias = Callable[[bytes], tuple[Config, list[str]]]
"""From what the file holds to a configuration and warnings, a line each. Raises `ConfigError`."""
log = logging.getLogger(__name__)


class ConfigWatcher:
    """Calls `changed` once, as soon as a file holds a valid configuration other than `config`; then it is over.

    `content` is what the file held when `config` was loaded from it, and `load` does the same with other content (see
    `kproxy.config.flags.configure`): it returns configuration and warnings, or raises `ConfigError`. An edit that is
    not valid is reported, once, and changes nothing; nor does one that leaves the configuration as it is, such as
    a comment.

    `changed` is called from a thread of its own and must not raise. However the file is replaced counts: written in
    place, renamed into place, or by another target of a link on the way, as in a mounted ConfigMap. While it cannot be
    read, because it was deleted for example, nothing happens: what was loaded is better than nothing. What is no
    file, such as a pipe, can be read only once and is not followed.
    """

    def __init__(self, path: str, content: bytes, config: Config, load: Load, changed: Callable[[], None]) -> None:
        self._path, self._seen, self._config = path, content, config
        self._load, self._changed = load, changed
        self._missed = False
        self._follower = PathWatcher(
            path, self._take, name="config-watch", poll_period=RELOAD_PERIOD, stop_timeout=STOP_TIMEOUT
        )

    def start(self) -> None:
        """Start the thread that follows the file. It is a daemon: a process may end without `stop`."""
        if _is_stream(self._path):
            log.info("%s: is no file; changes are not followed", self._path)
            return
        self._follower.start()

    def stop(self) -> None:
        """End the thread. `changed` is not called any more afterwards, unless it is under way."""
        self._follower.stop()

    def _take(self, reading: PathSnapshot) -> bool:
        """Take in what was read; tell whether there is anything left to wait for."""
        content = reading.files.get(self._path)
        if not isinstance(content, bytes):
            if not self._missed:
                log.warning("%s: cannot be read any more; what was loaded stays in force", self._path)
            self._missed = True
            return True
        if content != self._seen:
            self._seen, self._missed = content, False
            return self._goes_on_with(content)
        if self._missed:
            log.info("%s: is there again, unchanged", self._path)
        self._missed = False
        return True

    def _goes_on_with(self, content: bytes) -> bool:
        """Judge an edit; tell whether the configuration stays as it is."""
        try:
            config, warnings = self._load(content)
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            log.error("%s (edit ignored; the configuration loaded before stays in use)", reason)
            return True
        if config != self._config:
            log.info("%s: has changed", self._path)
            self._changed()
            return False
        for warning in warnings:
            log.warning("%s", warning)
        log.info("%s: edited, but the settings are the same", self._path)
        return True


def _is_stream(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # it may come back
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
