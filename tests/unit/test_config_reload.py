"""Watching the configuration file for changes, with real files and inotify."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kproxy.config import load_config, reload
from kproxy.config.reload import ConfigWatcher
from kproxy.config.types import Config
from kproxy.documents import watch as documents_watch
from kproxy.documents.watch import PathSnapshot, PathWatcher
from kproxy.host.inotify import InotifyError
from tests.lab.waiting import HANG_GUARD
from tests.unit.config_files import HEADER

HEAD = HEADER.encode()
OLD = HEAD + b"mode: iptables\n"
NEW = HEAD + b"mode: nftables\n"
INVALID = HEAD + b"mode: iptables\niptables: {masqueradeBit: 32}\n"


class Reads:
    """The file contents that the watcher has read and processed."""

    def __init__(self) -> None:
        self._contents: queue.Queue[bytes | None] = queue.Queue()

    def observe(self, check: Callable[[PathSnapshot], bool]) -> Callable[[PathSnapshot], bool]:
        """Wrap the function that processes snapshots of the file."""

        def observed(snapshot: PathSnapshot) -> bool:
            continues = check(snapshot)
            content = next(iter(snapshot.files.values()), None)
            self._contents.put(content if isinstance(content, bytes) else None)
            return continues

        return observed

    def wait_for(self, content: bytes | None) -> None:
        """Wait until the watcher has processed this content, or with None, that the file is unreadable."""
        while self._contents.get(timeout=HANG_GUARD) != content:
            pass


class RunningWatcher:
    """A started `ConfigWatcher`, and its calls of `changed`."""

    def __init__(self, path: Path, loaded: bytes) -> None:
        self.changes: queue.Queue[str] = queue.Queue()
        load = partial(load_config, path=str(path))
        config, _ = load(loaded)
        self._watcher = ConfigWatcher(str(path), loaded, config, load, lambda: self.changes.put("changed"))
        self._watcher.start()

    def wait_for_change(self) -> None:
        assert self.changes.get(timeout=HANG_GUARD) == "changed"

    def stop(self) -> None:
        """Stop the watcher and wait for its thread, so that no further call of `changed` can follow."""
        threads = watcher_threads()
        self._watcher.stop(HANG_GUARD)
        for thread in threads:
            thread.join(HANG_GUARD)
        assert watcher_threads() == []


StartWatcher = Callable[..., RunningWatcher]


def watcher_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "config-watch"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Observe the reads of the watchers that the test starts."""
    monkeypatch.setattr(
        documents_watch, "SETTLE_TIMEOUT", 2 * HANG_GUARD
    )  # no read of a half-written file on a slow machine
    reads = Reads()

    def path_watcher(path: str, check: Callable[[PathSnapshot], bool], **options: Any) -> PathWatcher:
        return PathWatcher(path, reads.observe(check), **options)

    monkeypatch.setattr(reload, "PathWatcher", path_watcher)
    return reads


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / "config.conf"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def start_watcher() -> Iterator[StartWatcher]:
    """Return a function that starts a watcher, which stops after the test."""
    started: list[RunningWatcher] = []

    def start(path: Path, loaded: bytes = OLD) -> RunningWatcher:
        started.append(RunningWatcher(path, loaded))
        return started[-1]

    yield start
    for watcher in started:
        watcher.stop()


def write_in_place(path: Path) -> None:
    path.write_bytes(NEW)


def rename_into_place(path: Path) -> None:
    temporary = path.with_name("temporary")
    temporary.write_bytes(NEW)
    temporary.rename(path)


def delete_and_write(path: Path) -> None:
    path.unlink()
    path.write_bytes(NEW)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"clusterCIDR: 10.244.0.0/16\n")


def replace_by_a_symlink(path: Path) -> None:
    target = path.parents[1] / "target"
    target.write_bytes(NEW)
    path.unlink()
    path.symlink_to(target)


def replace_the_directory(path: Path) -> None:
    directory = path.parent
    directory.rename(directory.with_name("old"))
    directory.mkdir()
    path.write_bytes(NEW)


@pytest.mark.parametrize(
    "change", [write_in_place, rename_into_place, delete_and_write, append, replace_by_a_symlink, replace_the_directory]
)
def test_new_content_is_detected_however_it_is_written(
    path: Path, start_watcher: StartWatcher, reads: Reads, change: Callable[[Path], None]
) -> None:
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    change(path)
    watcher.wait_for_change()


def test_update_of_a_mounted_config_map_is_detected(tmp_path: Path, start_watcher: StartWatcher, reads: Reads) -> None:
    volume = tmp_path / "volume"
    for name, content in (("..first", OLD), ("..second", OLD), ("..third", NEW)):
        (volume / name).mkdir(parents=True)
        (volume / name / "config.conf").write_bytes(content)
    (volume / "..data").symlink_to("..first")
    path = volume / "config.conf"
    path.symlink_to("..data/config.conf")
    watcher = start_watcher(path)
    reads.wait_for(OLD)

    def swap(name: str) -> None:
        (volume / "..data_tmp").symlink_to(name)
        (volume / "..data_tmp").rename(volume / "..data")

    swap("..second")  # an update of another key of the ConfigMap
    reads.wait_for(OLD)
    assert watcher.changes.empty()
    swap("..third")
    watcher.wait_for_change()


def test_change_before_the_start_is_detected(path: Path, start_watcher: StartWatcher) -> None:
    path.write_bytes(NEW)
    start_watcher(path, loaded=OLD).wait_for_change()


def test_writes_of_the_same_content_are_ignored(path: Path, start_watcher: StartWatcher, reads: Reads) -> None:
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    path.touch()
    reads.wait_for(OLD)
    path.write_bytes(OLD)
    reads.wait_for(OLD)
    path.with_name("temporary").write_bytes(OLD)
    path.with_name("temporary").rename(path)
    reads.wait_for(OLD)
    assert watcher.changes.empty()
    path.write_bytes(NEW)
    watcher.wait_for_change()


def test_missing_file_changes_nothing_until_it_is_back(
    path: Path, start_watcher: StartWatcher, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    path.unlink()
    reads.wait_for(None)
    path.mkdir()
    reads.wait_for(None)
    path.rmdir()
    path.write_bytes(OLD)
    reads.wait_for(OLD)
    assert watcher.changes.empty()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: can no longer be read, keeping the current configuration",
        f"{path}: can be read again, unchanged",
    ]
    path.unlink()
    reads.wait_for(None)
    path.write_bytes(NEW)
    watcher.wait_for_change()


def test_invalid_edit_is_logged_once_and_ignored(
    path: Path, start_watcher: StartWatcher, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    path.write_bytes(INVALID)
    reads.wait_for(INVALID)
    path.write_bytes(INVALID)
    reads.wait_for(INVALID)
    path.write_bytes(b"- a")
    reads.wait_for(b"- a")
    path.write_bytes(b"")
    reads.wait_for(b"")
    path.write_bytes(OLD)
    reads.wait_for(OLD)
    assert watcher.changes.empty()
    ignored = "(edit ignored, keeping the current configuration)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", f"{path}:4: iptables.masqueradeBit: must be an integer from 0 to 31, not 32 {ignored}"),
        ("ERROR", f'{path}:1: must be a mapping, not ["a"] {ignored}'),
        ("ERROR", f"{path}: must contain a KubeProxyConfiguration, but is empty {ignored}"),
        ("INFO", f"{path}: edited, but the configuration is unchanged"),
    ]
    path.write_bytes(INVALID)
    reads.wait_for(INVALID)
    path.write_bytes(NEW)
    watcher.wait_for_change()


@pytest.mark.parametrize(
    "edit", [OLD + b"# a comment\n", b"mode: iptables\n" + HEAD, OLD + b"iptables: {masqueradeBit: 14}\n", HEAD]
)
def test_edit_that_changes_no_setting_is_ignored(
    path: Path, start_watcher: StartWatcher, reads: Reads, edit: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    path.write_bytes(edit)
    reads.wait_for(edit)
    assert watcher.changes.empty()
    assert caplog.messages == [f"{path}: edited, but the configuration is unchanged"]
    path.write_bytes(NEW)
    watcher.wait_for_change()


def test_misspelled_field_in_an_edit_is_logged(
    path: Path, start_watcher: StartWatcher, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    edit = OLD + b"clusterCidr: 10.0.0.0/8\n"
    path.write_bytes(edit)
    reads.wait_for(edit)
    assert watcher.changes.empty()
    assert caplog.messages == [f"{path}:4: clusterCidr: unknown field; did you mean clusterCIDR? (ignored)"]


def test_watching_ends_after_the_first_change(path: Path, start_watcher: StartWatcher) -> None:
    watcher = start_watcher(path)
    path.write_bytes(NEW)
    watcher.wait_for_change()
    for thread in watcher_threads():
        thread.join(HANG_GUARD)
    assert watcher_threads() == []
    path.write_bytes(OLD)
    watcher.stop()
    assert watcher.changes.empty()


def test_changes_after_the_stop_are_not_reported(path: Path, start_watcher: StartWatcher) -> None:
    watcher = start_watcher(path)
    watcher.stop()
    path.write_bytes(NEW)
    assert watcher_threads() == []
    assert watcher.changes.empty()


def test_pipe_is_not_watched(tmp_path: Path, start_watcher: StartWatcher, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    watcher = start_watcher(path)
    assert watcher_threads() == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: not a regular file, not watched for changes"
    ]
    watcher.stop()


def test_file_is_polled_if_inotify_is_unavailable(
    path: Path,
    start_watcher: StartWatcher,
    reads: Reads,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise InotifyError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(documents_watch, "Inotify", fail)
    monkeypatch.setattr(reload, "RELOAD_PERIOD", 0.01)
    watcher = start_watcher(path)
    reads.wait_for(OLD)
    reads.wait_for(OLD)
    assert watcher.changes.empty()
    path.write_bytes(NEW)
    watcher.wait_for_change()
    assert "cannot watch for changes (Too many open files)" in caplog.text


def test_edit_is_loaded_again_after_an_unexpected_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    config, _ = load_config(OLD, str(path))
    failures = [MemoryError("no memory"), MemoryError("no memory")]
    changed = threading.Event()

    def load(content: bytes) -> tuple[Config, list[str]]:
        if failures:
            raise failures.pop()
        return load_config(content, str(path))

    watcher = ConfigWatcher(str(path), OLD, config, load, changed.set)
    watcher.start()
    rename_into_place(path)
    assert changed.wait(HANG_GUARD)
    watcher.stop(HANG_GUARD)
    unexpected = f"config-watch: {path}: unexpected MemoryError('no memory'); trying again"
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [unexpected]
