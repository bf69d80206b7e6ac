"""The capabilities and the seccomp profile of the DaemonSet: enough for every mode, and none can be removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.oci import SECCOMP, seccomp
from tests.deploy.rendered import DEPLOY
from tests.lab import objects
from tests.lab.client import Answered, TimedOut, send_request
from tests.lab.confined import missing_library
from tests.lab.proxy import FLAGS, KPROXY
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.lab.web_service import DROP_TIMEOUT

MODES = {
    "iptables-nft": ("iptables", ["iptables-nft-save"]),
    "iptables-legacy": ("iptables", ["iptables-legacy-save"]),
    "nftables": ("nftables", ["nft", "list", "table", "ip", "kube-proxy"]),
}
"""The proxy mode of each kind of rules, and the command that lists the rules."""
ENDPOINT = "10.244.1.7"
NEEDED = {
    "NET_ADMIN": [
        ("nftables", "missing capability CAP_NET_ADMIN"),
        ("iptables-nft", "missing capability CAP_NET_ADMIN"),
        ("iptables-legacy", "missing capability CAP_NET_ADMIN"),
    ],
    "NET_RAW": [("iptables-legacy", "")],
}
"""For each capability, the kinds of rules that cannot be programmed without it, and what the log then contains."""


DENIED_BY_CONTAINERD = frozenset(
    [
        "add_key",
        "keyctl",
        "mount",
        "mount_setattr",
        "move_mount",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "open_tree",
        "pivot_root",
        "reboot",
        "request_key",
        "setns",
        "umount",
        "umount2",
        "unshare",
        "clone",
        "clone3",
    ]
)
"""System calls that containerd's profile denies a container without CAP_SYS_ADMIN, but Debian's list may allow."""
_CLONE_NAMESPACES = 0x7E020000
"""The flags of clone(2) that create namespaces."""


def profile_of(capabilities: Sequence[str]) -> dict[str, Any]:
    """Return a profile that is at least as strict as containerd's `RuntimeDefault`, in OCI format."""
    profile = seccomp([f"CAP_{name}" for name in capabilities])
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in DENIED_BY_CONTAINERD]
    no_namespaces = {"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": _CLONE_NAMESPACES, "valueTwo": 0}
    profile["syscalls"].append({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [no_namespaces]})
    return profile


def security_context() -> dict[str, Any]:
    """Return the security context of the daemon's container."""
    daemon_set = yaml.safe_load((DEPLOY / "base/daemonset.yaml").read_text())
    (container,) = daemon_set["spec"]["template"]["spec"]["containers"]
    context: dict[str, Any] = container["securityContext"]
    return context


CAPABILITIES: list[str] = security_context()["capabilities"]["add"]


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Callable[[str, Sequence[str]], subprocess.Popen[str]]:
    """Start the daemon in a mode as root with only these capabilities, under the seccomp profile `RuntimeDefault`."""
    if reason := missing_library():
        pytest.skip(reason)
    if not SECCOMP.exists():
        pytest.skip(f"{SECCOMP} not found: install golang-github-containers-common")
    folder = tmp_path / "objects"
    folder.mkdir()
    found = [objects.node(), objects.service("web", "10.96.0.80", protocol="UDP")]
    endpoints = [objects.endpoint(ENDPOINT)]
    objects.write(folder / "web.yaml", [*found, objects.endpoint_slice("web", endpoints, protocol="UDP")])

    def run(kind: str, capabilities: Sequence[str], *flags: str) -> subprocess.Popen[str]:
        mode, _ = MODES[kind]
        programs = tmp_path / kind
        programs.mkdir()
        for name in ("iptables", "ip6tables") if mode == "iptables" else ():
            for suffix in ("", "-save", "-restore"):
                program = shutil.which(f"{name}{kind.removeprefix('iptables')}{suffix}")
                if program is None:
                    pytest.skip(f"{kind} not found")
                (programs / f"{name}{suffix}").symlink_to(program)
        profile = tmp_path / "seccomp.json"
        profile.write_text(json.dumps(profile_of(capabilities)))
        bounding = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
        command = [
            *("env", f"PATH={programs}:{os.environ['PATH']}"),
            *("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all"),
            *(sys.executable, "-m", "tests.lab.confined", str(profile)),
            *(KPROXY, "run", f"--objects={folder}", *FLAGS, f"--proxy-mode={mode}", *flags),
            f"--oom-score-adj={Path('/proc/self/oom_score_adj').read_text().strip()}",  # as set by the kubelet
        ]
        with log(tmp_path).open("w") as output:
            return lab.node.namespace.popen(command, output)

    return run


def log(tmp_path: Path) -> Path:
    return tmp_path / "kproxy.log"


def privileges(process: subprocess.Popen[str]) -> tuple[int, int, int]:
    """Return the effective capabilities, the seccomp mode and the flag `no_new_privs` of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    effective, mode, flag = (status.split(f"{name}:")[1].split()[0] for name in ("CapEff", "Seccomp", "NoNewPrivs"))
    return int(effective, 16), int(mode), int(flag)


@pytest.mark.parametrize("kind", MODES)
def test_daemon_works_with_the_privileges_of_the_manifest(
    lab: Lab, start: Callable[[str, Sequence[str]], subprocess.Popen[str]], tmp_path: Path, kind: str
) -> None:
    process = start(kind, CAPABILITIES)
    wait_until(
        lambda: process.poll() is not None or log(tmp_path).read_text().count(": synced ") >= 2,
        "kproxy syncs both families",
    )
    assert process.poll() is None, log(tmp_path).read_text()
    assert privileges(process) == (1 << 12 | 1 << 13, 2, 1), "NET_ADMIN and NET_RAW, a filter, no_new_privs"
    assert ENDPOINT in lab.node.namespace.run(MODES[kind][1]).stdout
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
    text = log(tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith(("W", "E", "Traceback"))] == []


def test_proxy_for_loopback_addresses_needs_no_further_privileges(
    lab: Lab, servers: Servers, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    pod = lab.add_pod("pod", "10.244.1.8", "fd00:10:244:1::8")
    servers.serve(pod, 8080)
    service = objects.service("site", "10.96.0.81", type="NodePort")
    service["spec"]["ports"][0]["nodePort"] = 30080
    endpoints = objects.endpoint_slice("site", [objects.endpoint(pod.address())])
    objects.write(tmp_path / "objects" / "site.yaml", [service, endpoints])
    process = start("nftables", CAPABILITIES, "--nodeport-addresses=127.0.0.0/8,10.99.0.0/24,fd00:99::/64")
    wait_until(lambda: log(tmp_path).read_text().count(": synced ") >= 2, "kproxy syncs both families")
    assert send_request(lab.node, "127.0.0.1", 30080) == Answered("pod", lab.node.address())
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
    text = log(tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith(("W", "E", "Traceback"))] == []
    assert send_request(lab.node, "127.0.0.1", 30080, timeout=DROP_TIMEOUT) == TimedOut()  # waits for the next process


def test_each_capability_of_the_manifest_is_needed() -> None:
    assert set(NEEDED) == set(CAPABILITIES)
    assert security_context()["capabilities"]["drop"] == ["ALL"]
    assert security_context()["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize(
    ("removed", "case"),
    [(removed, case) for removed, cases in NEEDED.items() for case in cases],
)
def test_rules_cannot_be_programmed_without_a_capability(
    lab: Lab,
    start: Callable[[str, Sequence[str]], subprocess.Popen[str]],
    tmp_path: Path,
    removed: str,
    case: tuple[str, str],
) -> None:
    kind, message = case
    process = start(kind, [name for name in CAPABILITIES if name != removed])
    wait_until(
        lambda: process.poll() is not None or "sync failed" in log(tmp_path).read_text(), "kproxy reports the failure"
    )
    process.kill()
    process.wait(HANG_GUARD)
    assert message in log(tmp_path).read_text()
    assert ENDPOINT not in lab.node.namespace.run(MODES[kind][1], check=False).stdout


@pytest.mark.parametrize("kind", ["nftables", "iptables-nft"])
def test_only_legacy_iptables_needs_raw_sockets(
    lab: Lab, start: Callable[[str, Sequence[str]], subprocess.Popen[str]], tmp_path: Path, kind: str
) -> None:
    process = start(kind, ["NET_ADMIN"])
    wait_until(lambda: log(tmp_path).read_text().count(": synced ") >= 2, "kproxy syncs both families")
    assert ENDPOINT in lab.node.namespace.run(MODES[kind][1]).stdout
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


@pytest.mark.parametrize(
    "call",
    [
        "add_key",
        "bpf",
        "init_module",
        "keyctl",
        "mount",
        "open_by_handle_at",
        "setns",
        "unshare",
    ],
)
def test_profile_denies_system_calls_that_kproxy_does_not_need(tmp_path: Path, call: str) -> None:
    """The loader works: root cannot make these calls under the profile."""
    if reason := missing_library():
        pytest.skip(reason)
    if not SECCOMP.exists():
        pytest.skip(f"{SECCOMP} not found: install golang-github-containers-common")
    profile = tmp_path / "seccomp.json"
    profile.write_text(json.dumps(profile_of(CAPABILITIES)))
    script = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); seccomp = ctypes.CDLL('libseccomp.so.2');"
        f"number = seccomp.seccomp_syscall_resolve_name({call.encode()!r});"
        "libc.syscall(number, -1, -1, -1, -1, -1); print(ctypes.get_errno())"
    )
    command = [sys.executable, "-m", "tests.lab.confined", str(profile), sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout in {"1\n", "38\n"}, done  # EPERM, ENOSYS
