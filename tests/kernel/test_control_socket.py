"""The control socket of the daemon: `kproxy status` and `kproxy log-level` on a real node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.diagnose.report import schema
from kproxy.diagnose.status import Status
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.proxy import KPROXY, Daemon
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until

OBJECTS = """\
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: shop}
spec: {clusterIP: 10.96.0.81, clusterIPs: [10.96.0.81], ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80, protocol: TCP}]}
"""
NOBODY = 65534


def write(folder: Path, objects: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "shop.yaml").write_text(objects)


def command(lab: Lab, *arguments: str, user: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of kproxy on the lab's node."""
    prefix = ("setpriv", f"--reuid={user}", "--clear-groups") if user else ()
    return lab.node.namespace.run([*prefix, KPROXY, *arguments], check=False)


def status(lab: Lab) -> dict[str, Any]:
    done = command(lab, "status", "-o", "json")
    found: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator(schema(Status)).validate(found)
    return found


@BOTH_MODES
def test_status_of_a_running_daemon(lab: Lab, tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "objects"
    write(folder, OBJECTS)
    before = command(lab, "status")
    assert before.returncode == 3
    assert "no kproxy daemon answers" in before.stderr
    with Daemon(lab, folder, tmp_path / "kproxy.log", mode_flag(mode)) as daemon:
        daemon.wait_until_synced()
        found = status(lab)
        assert found["health"] == "Healthy"
        assert found["daemon"]["mode"] == mode
        assert [family["family"] for family in found["daemon"]["families"]] == ["IPv4", "IPv6"]
        four, six = found["daemon"]["families"]
        counts = {"programmed": 1, "withoutEndpoints": 1, "ignored": 1}
        assert {name: four["services"][name] for name in counts} == counts
        assert six["services"]["programmed"] == 0
        assert four["problems"] == [{"service": "shop/empty", "problem": "has no endpoints"}]
        text = command(lab, "status")
        assert text.returncode == 0
        assert "shop/empty: has no endpoints" in text.stdout
        assert max(map(len, text.stdout.splitlines())) <= 100
        assert "\x1b" not in text.stdout

        (folder / "more.yaml").write_text(OBJECTS.replace("name: empty", "name: late").replace("0.81", "0.82"))
        wait_until(
            lambda: status(lab)["daemon"]["families"][0]["services"]["withoutEndpoints"] == 2, "the change is counted"
        )


def test_only_root_may_ask(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    write(folder, OBJECTS)
    with Daemon(lab, folder, tmp_path / "kproxy.log", mode_flag("iptables")) as daemon:
        daemon.wait_until_synced()
        done = command(lab, "status", user=NOBODY)
        assert done.returncode == 3
        assert done.stderr == "kproxy: the kproxy daemon refuses: only root may ask the daemon\n"
        assert command(lab, "log-level", "4", user=NOBODY).returncode == 3
        assert command(lab, "log-level").stdout == "0\n"


SQUATTER = """
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0kproxy/control/v1")
listener.listen()
print("listening", flush=True)
listener.accept()[0].recv(1)
"""


def test_answers_of_other_users_are_refused(lab: Lab, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file:
        squatter = lab.node.namespace.popen(
            ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", SQUATTER], file
        )
    try:
        wait_until(lambda: output.read_text() == "listening\n", "the other program listens")
        done = command(lab, "status")
        assert done.returncode == 3
        assert "which is not a kproxy daemon" in done.stderr
    finally:
        squatter.kill()


def test_log_level_changes_while_the_daemon_runs(lab: Lab, tmp_path: Path) -> None:
    folder, log = tmp_path / "objects", tmp_path / "kproxy.log"
    write(folder, OBJECTS)
    with Daemon(lab, folder, log, mode_flag("iptables")) as daemon:
        daemon.wait_until_synced()
        assert command(lab, "log-level", "4").returncode == 0
        assert command(lab, "log-level").stdout == "4\n"
        write(folder, OBJECTS.replace("80, protocol", "81, protocol"))
        wait_until(lambda: ": synced" in log.read_text().rpartition("log verbosity")[2], "each sync is logged")
        wrong = command(lab, "log-level", "high")
        assert (wrong.returncode, wrong.stderr) == (
            2,
            "kproxy: VERBOSITY must be an integer from 0 to 10, not 'high'\n",
        )


def test_a_second_daemon_runs_without_the_control_socket(lab: Lab, tmp_path: Path) -> None:
    """As during a rolling update, until the first daemon stops."""
    folder = tmp_path / "objects"
    write(folder, OBJECTS)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    ports = ("--healthz-bind-address=", "--metrics-bind-address=")
    with Daemon(lab, folder, logs[0], mode_flag("iptables")) as first:
        first.wait_until_synced()
        with Daemon(lab, folder, logs[1], mode_flag("iptables"), *ports) as second:
            second.wait_until_synced()
            assert "control socket: cannot listen" in logs[1].read_text()
            old = status(lab)["daemon"]["pid"]
            first.terminate()
            wait_until(lambda: command(lab, "status").returncode == 0, "the second daemon answers")
            assert status(lab)["daemon"]["pid"] not in {old, os.getpid()}
