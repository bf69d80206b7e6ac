"""How a start that cannot succeed ends: with one line, and the node as it was."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from kproxy.host.nfacct import read_counter
from kproxy.iptables.base_rules import INVALID_COUNTER
from tests.lab.modes import BOTH_MODES
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.requirements import UNPRIVILEGED, missing_access
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN

OBJECTS = f"--objects={GOLDEN}/clusterip"
NOT_OF_THE_MACHINE = "--conntrack-max-per-core=0"
"""Keeps a start away from the parameters that all network namespaces share."""

WITHOUT = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
REFUSED = "missing capability CAP_NET_ADMIN in this network namespace: run as root or grant it to the process"
ASK = "from kproxy.host.process import has_net_admin; print(has_net_admin())"
ESTABLISHED = "net/netfilter/nf_conntrack_tcp_timeout_established"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
FRESH = {ESTABLISHED: 432000, ROUTE_LOCALNET: 0}
"""What a network namespace begins with (nf_conntrack-sysctl.rst, ip-sysctl.rst)."""


def parameters(node: Namespace) -> dict[str, int]:
    return {name: int(node.run(["cat", f"/proc/sys/{name}"]).stdout) for name in FRESH}


# Privileges


@pytest.mark.parametrize(
    ("wrapper", "allowed"),
    [
        ([], True),
        (WITHOUT, False),
        ([*UNPRIVILEGED], False),
        ([*UNPRIVILEGED, "--inh-caps=+net_admin", "--ambient-caps=+net_admin"], True),
    ],
    ids=["root", "root without it", "nobody", "nobody with it"],
)
def test_the_kernel_tells_whether_there_is_the_capability(node: Namespace, wrapper: list[str], allowed: bool) -> None:
    if UNPRIVILEGED[1] in wrapper and (reason := missing_access()):
        pytest.skip(reason)
    links = node.run(["ip", "address"]).stdout
    assert node.run([*wrapper, sys.executable, "-c", ASK]).stdout == f"{allowed}\n"
    assert node.run(["ip", "address"]).stdout == links


@pytest.mark.parametrize(("own", "allowed"), [([], False), (["--net"], True)], ids=["outer", "own"])
def test_root_of_a_user_namespace_needs_a_network_of_its_own(node: Namespace, own: list[str], allowed: bool) -> None:
    done = node.run(["unshare", "--user", "--map-root-user", *own, sys.executable, "-c", ASK], check=False)
    if done.returncode:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout == f"{allowed}\n"


@BOTH_MODES
@pytest.mark.parametrize(
    "command", [("run", OBJECTS), ("apply", OBJECTS), ("run", "--cleanup"), ("run", "--init-only")], ids=" ".join
)
def test_without_the_capability_one_line_says_so(node: Namespace, mode: str, command: tuple[str, ...]) -> None:
    done = node.run([*WITHOUT, KPROXY, *command, f"--proxy-mode={mode}", NOT_OF_THE_MACHINE], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kproxy: {REFUSED}\n")
    assert parameters(node) == FRESH


@pytest.mark.parametrize("more", [OBJECTS, "--init-only"])
def test_without_the_capability_no_mode_is_chosen(node: Namespace, more: str) -> None:
    done = node.run([*WITHOUT, KPROXY, "run", more, "--proxy-mode=", NOT_OF_THE_MACHINE], check=False)
    assert (done.returncode, done.stderr) == (1, f"kproxy: {REFUSED}\n")


def test_with_json_the_line_is_json(node: Namespace) -> None:
    done = node.run([*WITHOUT, KPROXY, "run", OBJECTS, "--logging-format=json"], check=False)
    assert done.returncode == 1
    assert json.loads(done.stderr)["msg"] == REFUSED


def test_what_changes_nothing_needs_no_capability(node: Namespace, tmp_path: Path) -> None:
    for command in (["render", OBJECTS], ["run", f"--write-config-to={tmp_path}/written"], ["completion", "bash"]):
        assert node.run([*WITHOUT, KPROXY, *command]).returncode == 0


@BOTH_MODES
def test_an_ordinary_user_with_the_capability_keeps_the_rules(node: Namespace, mode: str, tmp_path: Path) -> None:
    if mode == "iptables" and "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy needs more than CAP_NET_ADMIN")
    if reason := missing_access():
        pytest.skip(reason)
    user = [*UNPRIVILEGED, "--inh-caps=+net_admin", "--ambient-caps=+net_admin", "--bounding-set=-all,+net_admin"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([*user, KPROXY, "run", OBJECTS, f"--proxy-mode={mode}", NOT_OF_THE_MACHINE], output)

    def has_synced() -> bool:
        assert process.poll() is None, log.read_text()
        return "10.96.1.1" in node.run(["nft", "list", "ruleset"]).stdout

    wait_until(has_synced, "the rules of the Services")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


# The order of a start


@BOTH_MODES
def test_a_start_without_credentials_changes_nothing(node: Namespace, mode: str) -> None:
    command = [KPROXY, "run", "--kubeconfig=/nonexistent", f"--proxy-mode={mode}", NOT_OF_THE_MACHINE]
    done = node.run(command, check=False)
    assert (done.returncode, done.stderr) == (1, "kproxy: /nonexistent: No such file or directory\n")
    assert parameters(node) == FRESH
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


@BOTH_MODES
def test_a_start_whose_port_is_taken_changes_nothing(node: Namespace, mode: str) -> None:
    taken = node.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.bind(("127.0.0.1", 10249))
    taken.listen()
    flags = [OBJECTS, "--bind-address-hard-fail", f"--proxy-mode={mode}", NOT_OF_THE_MACHINE]
    with taken:
        done = node.run([KPROXY, "run", *flags], check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "kproxy: metricsBindAddress 127.0.0.1:10249: cannot listen: Address already in use"
    assert parameters(node) == FRESH
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


def test_objects_that_cannot_be_read_make_no_counters(node: Namespace) -> None:
    done = node.run([KPROXY, "apply", "--objects=/nonexistent"], check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert node.call(lambda: read_counter(INVALID_COUNTER)) is None


@BOTH_MODES
def test_parameters_are_set_and_logged_by_a_start_that_succeeds(node: Namespace, mode: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = node.popen([KPROXY, "run", OBJECTS, f"--proxy-mode={mode}", NOT_OF_THE_MACHINE], output)
    wanted = {ESTABLISHED: 86400, ROUTE_LOCALNET: int(mode == "iptables")}
    wait_until(lambda: parameters(node) == wanted, "the kernel parameters")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
    assert_logged(log.read_text(), wanted)


@BOTH_MODES
def test_parameters_are_set_and_logged_by_init_only(node: Namespace, mode: str) -> None:
    done = node.run([KPROXY, "run", "--init-only", f"--proxy-mode={mode}", NOT_OF_THE_MACHINE])
    wanted = {ESTABLISHED: 86400, ROUTE_LOCALNET: int(mode == "iptables")}
    assert parameters(node) == wanted
    assert_logged(done.stderr, wanted)
    again = node.run([KPROXY, "run", "--init-only", f"--proxy-mode={mode}", NOT_OF_THE_MACHINE])
    assert "sysctl" not in again.stderr


def assert_logged(log: str, wanted: dict[str, int]) -> None:
    for name, value in wanted.items():
        line = f"] set sysctl {name.replace('/', '.')}: {FRESH[name]} -> {value}\n"
        assert log.count(line) == int(value != FRESH[name]), log
