"""The watch over the configuration file, with real files."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kproxy.config import load_config, reload
from kproxy.config.reload import ConfigWatcher
from kproxy.documents import watch as documents_watch
from kproxy.documents.watch import PathSnapshot
from kproxy.host.inotify import InotifyError

HANG = 20.0
"""Seconds after which a test that waits has hung."""

HEAD = b"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OLD = HEAD + b"mode: iptables\n"
NEW = HEAD + b"mode: nftables\n"
WRONG = HEAD + b"mode: iptables\niptables: {masqueradeBit: 32}\n"


class Watched:
    """A running watch; `until_changed` waits for its word."""

    def __init__(self, path: Path, loaded: bytes) -> None:
        self.calls: queue.Queue[str] = queue.Queue()
        load = partial(load_config, path=str(path))
        config, _ = load(loaded)
        self.watch = ConfigWatcher(str(path), loaded, config, load, lambda: self.calls.put("changed"))
        self.watch.start()

    def until_changed(self) -> None:
        assert self.calls.get(timeout=HANG) == "changed"

    def stop(self) -> None:
        """End the watch; afterwards all calls have been made."""
        threads = running()
        self.watch.stop()
        for thread in threads:
            thread.join(HANG)
        assert running() == []


class Looks:
    """Makes what the watch has read something to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._contents: queue.Queue[bytes | None] = queue.Queue()
        take = ConfigWatcher._check

        def seen(self_: ConfigWatcher, reading: PathSnapshot) -> bool:
            goes_on = take(self_, reading)
            content = next(iter(reading.files.values()), None)
            self._contents.put(content if isinstance(content, bytes) else None)
            return goes_on

        monkeypatch.setattr(ConfigWatcher, "_check", seen)

    def until(self, content: bytes | None) -> None:
        """Wait until the watch has read this, None for nothing at all, and has acted on it."""
        while self._contents.get(timeout=HANG) != content:
            pass


Follow = Callable[..., Watched]


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "config-watch"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setattr(documents_watch, "SETTLE_TIMEOUT", 2 * HANG)  # on a slow machine, no half-written file either
    return Looks(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    path = folder / "config.conf"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def follow() -> Iterator[Follow]:
    started: list[Watched] = []

    def start(path: Path, loaded: bytes = OLD) -> Watched:
        started.append(Watched(path, loaded))
        return started[-1]

    yield start
    for watched in started:
        watched.stop()


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


def link_elsewhere(path: Path) -> None:
    other = path.parents[1] / "elsewhere"
    other.write_bytes(NEW)
    path.unlink()
    path.symlink_to(other)


def replace_the_folder(path: Path) -> None:
    folder = path.parent
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    path.write_bytes(NEW)


@pytest.mark.parametrize(
    "change", [write_in_place, rename_into_place, delete_and_write, append, link_elsewhere, replace_the_folder]
)
def test_other_content_is_noticed_however_it_comes(
    path: Path, follow: Follow, looks: Looks, change: Callable[[Path], None]
) -> None:
    watched = follow(path)
    looks.until(OLD)
    change(path)
    watched.until_changed()


def test_the_swap_of_a_mounted_config_map_is_noticed(tmp_path: Path, follow: Follow, looks: Looks) -> None:
    volume = tmp_path / "volume"
    for name, content in (("..first", OLD), ("..second", OLD), ("..third", NEW)):
        (volume / name).mkdir(parents=True)
        (volume / name / "config.conf").write_bytes(content)
    (volume / "..data").symlink_to("..first")
    path = volume / "config.conf"
    path.symlink_to("..data/config.conf")
    watched = follow(path)
    looks.until(OLD)

    def swap(name: str) -> None:
        (volume / "..data_tmp").symlink_to(name)
        (volume / "..data_tmp").rename(volume / "..data")

    swap("..second")  # another file of the ConfigMap has changed
    looks.until(OLD)
    assert watched.calls.empty()
    swap("..third")
    watched.until_changed()


def test_a_change_before_the_start_is_noticed(path: Path, follow: Follow) -> None:
    path.write_bytes(NEW)
    follow(path, loaded=OLD).until_changed()


def test_a_file_that_only_looks_changed_is_left_alone(path: Path, follow: Follow, looks: Looks) -> None:
    watched = follow(path)
    looks.until(OLD)
    path.touch()
    looks.until(OLD)
    path.write_bytes(OLD)
    looks.until(OLD)
    path.with_name("temporary").write_bytes(OLD)
    path.with_name("temporary").rename(path)
    looks.until(OLD)
    assert watched.calls.empty()
    path.write_bytes(NEW)
    watched.until_changed()


def test_a_file_that_is_gone_changes_nothing_until_it_comes_back(
    path: Path, follow: Follow, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watched = follow(path)
    looks.until(OLD)
    path.unlink()
    looks.until(None)
    path.mkdir()
    looks.until(None)
    path.rmdir()
    path.write_bytes(OLD)
    looks.until(OLD)
    assert watched.calls.empty()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: can no longer be read, keeping the current configuration",
        f"{path}: can be read again, unchanged",
    ]
    path.unlink()
    looks.until(None)
    path.write_bytes(NEW)
    watched.until_changed()


def test_an_edit_that_is_not_valid_is_reported_once_and_changes_nothing(
    path: Path, follow: Follow, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watched = follow(path)
    looks.until(OLD)
    path.write_bytes(WRONG)
    looks.until(WRONG)
    path.write_bytes(WRONG)
    looks.until(WRONG)
    path.write_bytes(b"- a")
    looks.until(b"- a")
    path.write_bytes(b"")
    looks.until(b"")
    path.write_bytes(OLD)
    looks.until(OLD)
    assert watched.calls.empty()
    ignored = "(edit ignored, keeping the current configuration)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", f"{path}:4: iptables.masqueradeBit: must be an integer from 0 to 31, not 32 {ignored}"),
        ("ERROR", f'{path}:1: must be a mapping, not ["a"] {ignored}'),
        ("ERROR", f"{path}: must contain a KubeProxyConfiguration, but is empty {ignored}"),
        ("INFO", f"{path}: edited, but the configuration is unchanged"),
    ]
    path.write_bytes(WRONG)
    looks.until(WRONG)
    path.write_bytes(NEW)
    watched.until_changed()


@pytest.mark.parametrize(
    "edit", [OLD + b"# a comment\n", b"mode: iptables\n" + HEAD, OLD + b"iptables: {masqueradeBit: 14}\n", HEAD]
)
def test_an_edit_that_leaves_the_settings_as_they_are_changes_nothing(
    path: Path, follow: Follow, looks: Looks, edit: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watched = follow(path)
    looks.until(OLD)
    path.write_bytes(edit)
    looks.until(edit)
    assert watched.calls.empty()
    assert caplog.messages == [f"{path}: edited, but the configuration is unchanged"]
    path.write_bytes(NEW)
    watched.until_changed()


def test_a_misspelt_field_in_an_edit_is_warned_about(
    path: Path, follow: Follow, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    watched = follow(path)
    looks.until(OLD)
    edit = OLD + b"clusterCidr: 10.0.0.0/8\n"
    path.write_bytes(edit)
    looks.until(edit)
    assert watched.calls.empty()
    assert caplog.messages == [f"{path}:4: clusterCidr: unknown field; did you mean clusterCIDR? (ignored)"]


def test_it_is_said_once_and_then_over(path: Path, follow: Follow) -> None:
    watched = follow(path)
    path.write_bytes(NEW)
    watched.until_changed()
    for thread in running():
        thread.join(HANG)
    assert running() == []
    path.write_bytes(OLD)
    watched.stop()
    assert watched.calls.empty()


def test_nothing_is_said_after_the_stop(path: Path, follow: Follow) -> None:
    watched = follow(path)
    watched.stop()
    path.write_bytes(NEW)
    assert running() == []
    assert watched.calls.empty()


def test_a_pipe_is_not_followed(tmp_path: Path, follow: Follow, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    watched = follow(path)
    assert running() == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: not a regular file, not watched for changes"
    ]
    watched.stop()


def test_without_notices_of_the_kernel_the_file_is_looked_at_now_and_then(
    path: Path, follow: Follow, looks: Looks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise InotifyError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(documents_watch, "Inotify", refuse)
    monkeypatch.setattr(reload, "RELOAD_PERIOD", 0.01)
    watched = follow(path)
    looks.until(OLD)
    looks.until(OLD)
    assert watched.calls.empty()
    path.write_bytes(NEW)
    watched.until_changed()
    assert "cannot watch for changes (Too many open files)" in caplog.text
