"""Credentials of exec plugins that take long: which threads wait for them, and how often they are run."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from tests.apiserver import ApiServer
from tests.unit.test_client import HANG, SERVICES, get, kubeconfig, server

__all__ = ["server"]

SLOW_PLUGIN = """#!/bin/sh
cd "$(dirname "$0")"
echo >>runs
[ -p started ] && echo >started
while [ -e hold ]; do sleep 0.01; done
[ -e fail ] && { echo 'no smart card' >&2; exit 1; }
cat answer
"""


class SlowPlugin:
    """A user with an exec plugin that, while it is held, does not end."""

    def __init__(self, folder: Path, *, token: str, valid: float) -> None:
        self._folder = folder
        program = folder / "plugin"
        program.write_text(SLOW_PLUGIN)
        program.chmod(0o755)
        self.user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program)}}
        self.answer(token, valid)

    def answer(self, token: str, valid: float) -> None:
        """Set the token of the next runs, which is valid for so many seconds."""
        expiry = (datetime.now(UTC) + timedelta(seconds=valid)).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = {"token": token, "expirationTimestamp": expiry}
        text = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
        (self._folder / "answer").write_text(json.dumps(text))

    def hold(self) -> None:
        (self._folder / "hold").touch()
        os.mkfifo(self._folder / "started")
        self._started = os.open(self._folder / "started", os.O_RDONLY | os.O_NONBLOCK)

    def wait_until_started(self) -> None:
        poll = select.poll()
        poll.register(self._started, select.POLLIN)
        assert poll.poll(HANG * 1000)

    def release(self, *, fail: bool = False) -> None:
        if fail:
            (self._folder / "fail").touch()
        os.close(self._started)
        (self._folder / "started").unlink()
        (self._folder / "hold").unlink()

    @property
    def runs(self) -> int:
        return len((self._folder / "runs").read_text())


class ObservedLock:
    """A lock that counts attempts to take it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.attempts = threading.Semaphore(0)
        self.release = self._lock.release

    def acquire(self, *, blocking: bool) -> bool:
        self.attempts.release()
        return self._lock.acquire(blocking=blocking)


class Called(threading.Thread):
    """A call in a thread of its own, and its result or `ClientError`."""

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
        self.join(HANG)
        assert not self.is_alive(), "the call is blocked"
        return self._result


def authorizations(server: ApiServer) -> list[str | None]:
    return [seen.headers.get("Authorization") for seen in server.requests.all()]


def test_no_thread_waits_for_a_plugin_while_the_token_is_valid(tmp_path: Path, server: ApiServer) -> None:
    server.tokens = {"first", "second", "secret"}
    slow = SlowPlugin(tmp_path, token="first", valid=120)  # less than the five minutes before which it is refreshed
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, slow.user))
    static = ApiClient.from_config(kubeconfig(tmp_path / "static", server.url, {"token": "secret"}))
    slow.answer("second", 3600)
    slow.hold()
    refreshing = Called(lambda: get(client))
    slow.wait_until_started()
    assert Called(lambda: get(client)).result()[0] == 200
    assert Called(lambda: get(static)).result()[0] == 200
    with static.get(SERVICES, {}, HANG) as response:
        Called(lambda: client.renew(response)).result()  # of other credentials than the current ones
    Called(client.close).result()
    assert refreshing.is_alive()
    slow.release()
    assert refreshing.result()[0] == 200
    assert get(client)[0] == 200
    tokens = ["first", "secret", "secret", "second", "second"]
    assert authorizations(server) == [f"Bearer {token}" for token in tokens]
    assert slow.runs == 2  # when it was loaded, and when it was due


def wait_for(
    client: ApiClient, lock: ObservedLock, calls: list[Callable[[], object]], slow: SlowPlugin
) -> list[Called]:
    """Start the calls, all of which need what the plugin answers; return once all wait for it."""
    threads = [Called(call) for call in calls]
    for _ in calls:
        assert lock.attempts.acquire(timeout=HANG)
    slow.wait_until_started()
    return threads


@pytest.mark.parametrize("fail", [False, True])
def test_threads_with_an_expired_token_wait_for_one_run_of_the_plugin(
    tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch, fail: bool
) -> None:
    server.tokens = {"second"}
    slow = SlowPlugin(tmp_path, token="first", valid=-60)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, slow.user))
    monkeypatch.setattr(client, "_updating", lock := ObservedLock())
    slow.answer("second", 3600)
    slow.hold()
    threads = wait_for(client, lock, [lambda: get(client)[0]] * 4, slow)
    Called(client.close).result()
    slow.release(fail=fail)
    results = [str(thread.result()) for thread in threads]
    assert results == [f"{tmp_path}/config: exec: process returned 1. no smart card" if fail else "200"] * 4
    assert authorizations(server) == ([] if fail else ["Bearer second"] * 4)
    assert slow.runs == 2


def test_a_plugin_runs_once_for_all_threads_whose_token_is_rejected(
    tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tokens = {"second"}
    slow = SlowPlugin(tmp_path, token="first", valid=3600)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, slow.user))
    with client.get(SERVICES, {}, HANG) as rejected:
        assert rejected.status == 401
    monkeypatch.setattr(client, "_updating", lock := ObservedLock())
    slow.answer("second", 3600)
    slow.hold()
    threads = wait_for(client, lock, [lambda: client.renew(rejected)] * 4, slow)
    assert Called(lambda: get(client)).result()[0] == 401, "a request does not wait"
    slow.release()
    assert [thread.result() for thread in threads] == [None] * 4
    assert get(client)[0] == 200
    assert slow.runs == 2
