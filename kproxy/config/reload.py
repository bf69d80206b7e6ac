"""Watch the configuration file, and report an edit that is valid and changes the configuration."""

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
"""Seconds between reads of the file if inotify does not work."""
Load: TypeAlias = Callable[[bytes], tuple[Config, list[str]]]
"""Returns the configuration for a file's content, and one-line warnings. Raises `ConfigError`."""
log = logging.getLogger(__name__)


class ConfigWatcher:
    """Calls `changed` once a file contains a valid configuration that differs from `config`, then stops watching.

    `content` is the file content from which `config` was loaded, and `load` loads a configuration from new content (see
    `kproxy.config.flags.configure`). Edits that are invalid, or that do not change the configuration, such as an edit
    to a comment, are logged once and have no other effect.

    `changed` runs in a separate thread and must not raise. The file may be written in place, replaced by rename, or
    reached through symbolic links that change, as in a mounted ConfigMap. While it cannot be read, for example because
    it was deleted, the current configuration stays in use. A path that is not a regular file, such as a pipe, can be
    read only once and is not watched.
    """

    def __init__(self, path: str, content: bytes, config: Config, load: Load, changed: Callable[[], None]) -> None:
        self._path, self._content, self._config = path, content, config
        self._load, self._changed = load, changed
        self._unreadable = False
        self._watcher = PathWatcher(path, self._check, name="config-watch", poll_period=RELOAD_PERIOD)

    def start(self) -> None:
        """Start the thread."""
        if _is_stream(self._path):
            log.info("%s: not a regular file, not watched for changes", self._path)
            return
        self._watcher.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread; wait at most `timeout` seconds for a running call of `changed`."""
        self._watcher.stop(timeout)

    def _check(self, snapshot: PathSnapshot) -> bool:
        """Process a snapshot of the file. Return whether to continue watching."""
        content = snapshot.files.get(self._path)
        if not isinstance(content, bytes):
            if not self._unreadable:
                log.warning("%s: can no longer be read, keeping the current configuration", self._path)
            self._unreadable = True
            return True
        if content != self._content:
            self._content, self._unreadable = content, False
            return self._check_edit(content)
        if self._unreadable:
            log.info("%s: can be read again, unchanged", self._path)
        self._unreadable = False
        return True

    def _check_edit(self, content: bytes) -> bool:
        """Process an edit. Return whether to continue watching."""
        try:
            config, warnings = self._load(content)
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            log.error("%s (edit ignored, keeping the current configuration)", reason)
            return True
        if config != self._config:
            log.info("%s: configuration changed", self._path)
            self._changed()
            return False
        for warning in warnings:
            log.warning("%s", warning)
        log.info("%s: edited, but the configuration is unchanged", self._path)
        return True


def _is_stream(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # the file may come back
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
