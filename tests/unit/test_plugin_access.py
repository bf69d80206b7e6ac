"""Slow exec plugins: which threads wait for their credentials, and how often they run."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from tests.apiserver import ApiServer
from tests.lab.waiting import HANG_GUARD
from tests.unit.client_fixtures import (
    SERVICES,
    authorizations,
    exec_credential,
    exec_user,
    get,
    kubeconfig,
    server,
)

__all__ = ["server"]

SLOW_PLUGIN = """#!/bin/sh
cd "$(dirname "$0")"
echo >>runs
[ -p started ] && echo >started
while [ -e blocked ]; do sleep 0.01; done
[ -e fail ] && { echo 'no smart card' >&2; exit 1; }
cat answer
"""


class SlowPlugin:
    """An exec plugin that can be blocked. `user` is the kubeconfig's user that runs it.

    Its first token is valid for `lifetime` seconds.
    """

    def __init__(self, directory: Path, *, token: str, lifetime: float) -> None:
        self._directory = directory
        program = directory / "plugin"
        program.write_text(SLOW_PLUGIN)
        program.chmod(0o755)
        self.user = exec_user(program)
        self.set_token(token, lifetime)

    def set_token(self, token: str, lifetime: float) -> None:
        """Set the token that the plugin returns from now on, and the seconds for which it is valid."""
        expiry = (datetime.now(UTC) + timedelta(seconds=lifetime)).strftime("%Y-%m-%dT%H:%M:%SZ")
        (self._directory / "answer").write_text(exec_credential(token=token, expirationTimestamp=expiry))

    def block(self) -> None:
        """Let the next runs block until `unblock`."""
        (self._directory / "blocked").touch()
        os.mkfifo(self._directory / "started")
        self._started = os.open(self._directory / "started", os.O_RDONLY | os.O_NONBLOCK)

    def wait_until_started(self) -> None:
        """Wait until a run has begun since `block`."""
        poll = select.poll()
        poll.register(self._started, select.POLLIN)
        assert poll.poll(HANG_GUARD * 1000)

    def unblock(self, *, fail: bool = False) -> None:
        """Let the blocked run complete, or fail."""
        if fail:
            (self._directory / "fail").touch()
        os.close(self._started)
        (self._directory / "started").unlink()
        (self._directory / "blocked").unlink()

    @property
    def runs(self) -> int:
        """The number of runs so far."""
        return len((self._directory / "runs").read_text())


class ObservedLock:
    """A lock that counts the attempts to acquire it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.attempts = threading.Semaphore(0)
        self.release = self._lock.release

    def acquire(self, *, blocking: bool) -> bool:
        self.attempts.release()
        return self._lock.acquire(blocking=blocking)


class Call(threading.Thread):
    """A call in another thread. Its result is the function's, or the `ClientError` that it raised."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._result: object = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except ClientError as error:
            self._result = error

    def result(self) -> Any:
        self.join(HANG_GUARD)
        assert not self.is_alive(), "the call is blocked"
        return self._result


@pytest.fixture
def update_lock(monkeypatch: pytest.MonkeyPatch) -> ObservedLock:
    """Observe the lock that serializes the updates of credentials. For one client."""
    lock = ObservedLock()
    monkeypatch.setattr("kproxy.kube.client.client.threading", SimpleNamespace(Lock=lambda: lock))
    return lock


def test_no_thread_waits_for_the_plugin_while_the_token_is_valid(tmp_path: Path, server: ApiServer) -> None:
    server.tokens = {"first", "second", "secret"}
    plugin = SlowPlugin(tmp_path, token="first", lifetime=120)  # tokens are refreshed five minutes before they expire
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, plugin.user))
    static = ApiClient.from_config(kubeconfig(tmp_path / "static", server.url, {"token": "secret"}))
    plugin.set_token("second", 3600)
    plugin.block()
    refreshing = Call(lambda: get(client))
    plugin.wait_until_started()
    assert Call(lambda: get(client)).result()[0] == 200
    assert Call(lambda: get(static)).result()[0] == 200
    with static.get(SERVICES, {}, HANG_GUARD) as response:
        Call(lambda: client.renew(response)).result()  # the response is to the credentials of another client
    Call(client.close).result()
    assert refreshing.is_alive()
    plugin.unblock()
    assert refreshing.result()[0] == 200
    assert get(client)[0] == 200
    tokens = ["first", "secret", "secret", "second", "second"]
    assert authorizations(server) == [f"Bearer {token}" for token in tokens]
    assert plugin.runs == 2  # when the kubeconfig was loaded, and for the refresh


def test_failed_refresh_keeps_a_token_that_is_still_valid(
    tmp_path: Path, server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokens = {"first"}
    plugin = SlowPlugin(tmp_path, token="first", lifetime=120)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, plugin.user))
    plugin.block()
    refreshing = Call(lambda: get(client)[0])
    plugin.wait_until_started()
    plugin.unblock(fail=True)
    assert refreshing.result() == 200
    reason = "exec: process returned 1. no smart card"
    assert caplog.messages == [
        f"cannot refresh the credentials, keeping the current ones: {tmp_path}/config: {reason}",
    ]


def start_waiting(functions: list[Callable[[], object]], lock: ObservedLock, plugin: SlowPlugin) -> list[Call]:
    """Call functions that need new credentials. Return once one of them runs the plugin and the others wait for it."""
    calls = [Call(function) for function in functions]
    for _ in calls:
        assert lock.attempts.acquire(timeout=HANG_GUARD)
    plugin.wait_until_started()
    return calls


@pytest.mark.parametrize("fail", [False, True])
def test_threads_with_an_expired_token_wait_for_one_run_of_the_plugin(
    tmp_path: Path, server: ApiServer, update_lock: ObservedLock, fail: bool
) -> None:
    server.tokens = {"second"}
    plugin = SlowPlugin(tmp_path, token="first", lifetime=-60)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, plugin.user))
    plugin.set_token("second", 3600)
    plugin.block()
    calls = start_waiting([lambda: get(client)[0]] * 4, update_lock, plugin)
    Call(client.close).result()
    plugin.unblock(fail=fail)
    results = [str(call.result()) for call in calls]
    assert results == [f"{tmp_path}/config: exec: process returned 1. no smart card" if fail else "200"] * 4
    assert authorizations(server) == ([] if fail else ["Bearer second"] * 4)
    assert plugin.runs == 2


def test_plugin_runs_once_for_all_threads_whose_token_is_rejected(
    tmp_path: Path, server: ApiServer, update_lock: ObservedLock
) -> None:
    server.tokens = {"second"}
    plugin = SlowPlugin(tmp_path, token="first", lifetime=3600)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, plugin.user))
    with client.get(SERVICES, {}, HANG_GUARD) as rejected:
        assert rejected.status == 401
    plugin.set_token("second", 3600)
    plugin.block()
    calls = start_waiting([lambda: client.renew(rejected)] * 4, update_lock, plugin)
    assert Call(lambda: get(client)).result()[0] == 401, "requests do not wait for the plugin"
    plugin.unblock()
    assert [call.result() for call in calls] == [None] * 4
    assert get(client)[0] == 200
    assert plugin.runs == 2
