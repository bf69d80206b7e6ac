"""Watch the configuration file, and report the first valid edit that changes the configuration."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from typing import TypeAlias

from msgspec.structs import replace

from kproxy.config.decode import ConfigError
from kproxy.config.types import Config
from kproxy.documents.watch import PathSnapshot, PathWatcher

RELOAD_PERIOD = 10.0
"""Seconds between two reads of the file if inotify does not work."""
Load: TypeAlias = Callable[[bytes], tuple[Config, list[str]]]
"""Returns the configuration that results from the content of a file, and one-line warnings. Raises `ConfigError`."""
log = logging.getLogger(__name__)


class ConfigWatcher:
    """Watches the configuration file. Calls `changed` after the first valid edit that changes the configuration.

    `config` is the current configuration, and `content` is the file content from which it was loaded. `load` loads a
    configuration from new content (see `kproxy.config.flags.configure`). An edit that is invalid, or that does not
    change the configuration (such as an edit to a comment), is logged once and has no other effect.

    `changed` runs in a separate thread and must not raise. After the call, the file is no longer watched.

    An edit may write the file in place, replace it by rename, or change symbolic links on its path, as the kubelet does
    for a mounted ConfigMap. While the file cannot be read, for example because it was deleted, the current
    configuration stays in use. A pipe or device can be read only once and is not watched.
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
        """Stop the thread. If a call to `changed` is running, wait at most `timeout` seconds for it to return."""
        self._watcher.stop(timeout)

    def _check(self, snapshot: PathSnapshot) -> bool:
        """Compare a snapshot of the file with the previous content. Return whether to continue watching."""
        content = snapshot.files.get(self._path)
        if not isinstance(content, bytes):
            if not self._unreadable:
                log.warning("%s: can no longer be read, keeping the current configuration", self._path)
            self._unreadable = True
            return True
        if content != self._content:
            proceed = self._check_edit(content)
            self._content, self._unreadable = content, False  # only now: after an unexpected error, it is loaded again
            return proceed
        if self._unreadable:
            log.info("%s: can be read again, unchanged", self._path)
        self._unreadable = False
        return True

    def _check_edit(self, content: bytes) -> bool:
        """Load the edited file. Return whether to continue watching."""
        try:
            config, warnings = self._load(content)
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            log.error("%s (edit ignored, keeping the current configuration)", reason)
            return True
        if _with_mode(config) != _with_mode(self._config):
            log.info("%s: configuration changed", self._path)
            self._changed()
            return False
        for warning in warnings:
            log.warning("%s", warning)
        log.info("%s: edited, but the configuration is unchanged", self._path)
        return True


def _with_mode(config: Config) -> Config:
    """Return a configuration with the effective mode: to write the default into the file changes nothing."""
    return replace(config, mode=config.effective_mode)


def _is_stream(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # the file may be created again
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
