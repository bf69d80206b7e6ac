"""Starts that fail entirely, with one line and without changes to the node, or for one IP family."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from kproxy.host.nfacct import read_counter
from kproxy.iptables.names import INVALID_COUNTER
from tests.lab.modes import BOTH_MODES
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.requirements import UNPRIVILEGED, missing_access
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN

OBJECTS = f"--objects={GOLDEN}/clusterip"
NO_GLOBAL_SYSCTLS = "--conntrack-max-per-core=0"
"""Leaves the sysctls alone that all network namespaces share."""

WITHOUT_NET_ADMIN = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
MISSING_CAPABILITY = (
    "missing capability CAP_NET_ADMIN in this network namespace: run as root or grant it to the process"
)
CHECK_SCRIPT = "from kproxy.host.process import has_net_admin; print(has_net_admin())"
ESTABLISHED = "net/netfilter/nf_conntrack_tcp_timeout_established"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
DEFAULTS = {ESTABLISHED: 432000, ROUTE_LOCALNET: 0}
"""The defaults of a network namespace (nf_conntrack-sysctl.rst, ip-sysctl.rst)."""


def sysctls(node: Namespace) -> dict[str, int]:
    return {name: int(node.run(["cat", f"/proc/sys/{name}"]).stdout) for name in DEFAULTS}


# Capabilities.


@pytest.mark.parametrize(
    ("wrapper", "allowed"),
    [
        ([], True),
        (WITHOUT_NET_ADMIN, False),
        ([*UNPRIVILEGED], False),
        ([*UNPRIVILEGED, "--inh-caps=+net_admin", "--ambient-caps=+net_admin"], True),
    ],
    ids=["root", "root without CAP_NET_ADMIN", "nobody", "nobody with CAP_NET_ADMIN"],
)
def test_capability_is_detected(node: Namespace, wrapper: list[str], allowed: bool) -> None:
    if UNPRIVILEGED[1] in wrapper and (reason := missing_access()):
        pytest.skip(reason)
    links = node.run(["ip", "address"]).stdout
    assert node.run([*wrapper, sys.executable, "-c", CHECK_SCRIPT]).stdout == f"{allowed}\n"
    assert node.run(["ip", "address"]).stdout == links


@pytest.mark.parametrize(("own", "allowed"), [([], False), (["--net"], True)], ids=["outer", "own"])
def test_root_of_a_user_namespace_needs_its_own_network_namespace(
    node: Namespace, own: list[str], allowed: bool
) -> None:
    done = node.run(["unshare", "--user", "--map-root-user", *own, sys.executable, "-c", CHECK_SCRIPT], check=False)
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout == f"{allowed}\n"


@BOTH_MODES
@pytest.mark.parametrize(
    "command", [("run", OBJECTS), ("apply", OBJECTS), ("run", "--cleanup"), ("run", "--init-only")], ids=" ".join
)
def test_missing_capability_is_reported_in_one_line(node: Namespace, mode: str, command: tuple[str, ...]) -> None:
    done = node.run([*WITHOUT_NET_ADMIN, KPROXY, *command, f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kproxy: {MISSING_CAPABILITY}\n")
    assert sysctls(node) == DEFAULTS


@pytest.mark.parametrize("more", [OBJECTS, "--init-only"])
def test_no_mode_is_chosen_without_the_capability(node: Namespace, more: str) -> None:
    done = node.run([*WITHOUT_NET_ADMIN, KPROXY, "run", more, "--proxy-mode=", NO_GLOBAL_SYSCTLS], check=False)
    assert (done.returncode, done.stderr) == (1, f"kproxy: {MISSING_CAPABILITY}\n")


def test_missing_capability_is_reported_as_json(node: Namespace) -> None:
    done = node.run([*WITHOUT_NET_ADMIN, KPROXY, "run", OBJECTS, "--logging-format=json"], check=False)
    assert done.returncode == 1
    assert json.loads(done.stderr)["msg"] == MISSING_CAPABILITY


def test_read_only_commands_need_no_capability(node: Namespace, tmp_path: Path) -> None:
    for command in (["render", OBJECTS], ["run", f"--write-config-to={tmp_path}/written"], ["completion", "bash"]):
        assert node.run([*WITHOUT_NET_ADMIN, KPROXY, *command]).returncode == 0


@BOTH_MODES
def test_unprivileged_user_with_the_capability_can_run_kproxy(node: Namespace, mode: str, tmp_path: Path) -> None:
    if mode == "iptables" and "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy needs more than CAP_NET_ADMIN")
    if reason := missing_access():
        pytest.skip(reason)
    user = [*UNPRIVILEGED, "--inh-caps=+net_admin", "--ambient-caps=+net_admin", "--bounding-set=-all,+net_admin"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([*user, KPROXY, "run", OBJECTS, f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS], output)

    def has_synced() -> bool:
        assert process.poll() is None, log.read_text()
        return "10.96.1.1" in node.run(["nft", "list", "ruleset"]).stdout

    wait_until(has_synced, "the rules of the Services")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


# IP families.


def test_skipped_family_that_works_later_ends_the_process(node: Namespace, tmp_path: Path) -> None:
    """The restarted process programs both families."""
    failing, log = tmp_path / "failing", tmp_path / "log"
    failing.touch()
    wrapper = tmp_path / "ip6tables"
    wrapper.write_text(f'#!/bin/sh\n[ ! -e {failing} ] || exit 4\nexec {shutil.which("ip6tables")} "$@"\n')
    wrapper.chmod(0o755)
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    command = ["env", path, KPROXY, "run", OBJECTS, "--proxy-mode=iptables", NO_GLOBAL_SYSCTLS]
    with log.open("w") as output:
        process = node.popen(command, output)
    wait_until(lambda: "IPv4: synced " in log.read_text(), "a sync of IPv4")
    assert "skipping IPv6: ip6tables --version failed" in log.read_text()
    failing.unlink()
    assert process.wait(HANG_GUARD) == 1
    assert log.read_text().endswith("kproxy: IPv6 works on this node now: exiting to restart with it\n")
    assert "10.96.1.1" in node.run(["iptables-save"]).stdout


# The order of steps at start.


@BOTH_MODES
def test_start_without_credentials_changes_nothing(node: Namespace, mode: str) -> None:
    command = [KPROXY, "run", "--kubeconfig=/nonexistent", f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS]
    done = node.run(command, check=False)
    assert (done.returncode, done.stderr) == (1, "kproxy: /nonexistent: No such file or directory\n")
    assert sysctls(node) == DEFAULTS
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


@BOTH_MODES
def test_start_with_an_occupied_port_changes_nothing(node: Namespace, mode: str) -> None:
    taken = node.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.bind(("127.0.0.1", 10249))
    taken.listen()
    flags = [OBJECTS, "--bind-address-hard-fail", f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS]
    with taken:
        done = node.run([KPROXY, "run", *flags], check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "kproxy: metricsBindAddress 127.0.0.1:10249: cannot listen: Address already in use"
    assert sysctls(node) == DEFAULTS
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


def test_unreadable_objects_create_no_counters(node: Namespace) -> None:
    done = node.run([KPROXY, "apply", "--objects=/nonexistent"], check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


@BOTH_MODES
def test_successful_start_sets_and_logs_sysctls(node: Namespace, mode: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([KPROXY, "run", OBJECTS, f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS], output)
    expected = {ESTABLISHED: 86400, ROUTE_LOCALNET: int(mode == "iptables")}
    wait_until(lambda: sysctls(node) == expected, "the sysctls to be set")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
    assert_logged(log.read_text(), expected)


@BOTH_MODES
def test_init_only_sets_and_logs_sysctls(node: Namespace, mode: str) -> None:
    done = node.run([KPROXY, "run", "--init-only", f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS])
    expected = {ESTABLISHED: 86400, ROUTE_LOCALNET: int(mode == "iptables")}
    assert sysctls(node) == expected
    assert_logged(done.stderr, expected)
    again = node.run([KPROXY, "run", "--init-only", f"--proxy-mode={mode}", NO_GLOBAL_SYSCTLS])
    assert "sysctl" not in again.stderr


def assert_logged(log: str, expected: dict[str, int]) -> None:
    for name, value in expected.items():
        line = f"] set sysctl {name.replace('/', '.')}: {DEFAULTS[name]} -> {value}\n"
        assert log.count(line) == int(value != DEFAULTS[name]), log
