"""From a container of a Pod to what the kubelet and containerd make of it for runc: an OCI runtime configuration.

Facts are the OCI runtime specification's and containerd's defaults: what is masked and read-only in /proc, and which
system calls the profile `RuntimeDefault` allows (Debian's golang-github-containers-common ships the same list).
"""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

from tests.deploy.rendered import ROOT, Object

SECCOMP = Path("/usr/share/containers/seccomp.json")
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats"]
MASKED += ["/proc/sched_debug", "/proc/scsi", "/sys/firmware"]
READ_ONLY = ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
"""By their numbers (linux/capability.h)."""


def configuration(
    of: Object,
    arguments: list[str],
    *,
    root: Path,
    mounts: dict[str, Path],
    environment: dict[str, str],
    network: str,
) -> Object:
    """Return what runc is to do for a container: its image's files are below `root`.

    `mounts` has the source of each place that is mounted, and `network` is the path of a network namespace.
    """
    context = of["securityContext"]
    privileged = context.get("privileged", False)
    capabilities = held() if privileged else [f"CAP_{name}" for name in context["capabilities"]["add"]]
    linux: dict[str, Any] = {
        "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "network", "path": network}]
    }
    if not privileged:
        linux |= {"maskedPaths": MASKED, "readonlyPaths": READ_ONLY, "seccomp": seccomp(capabilities)}
    given = environment | image_environment()
    return {
        "ociVersion": "1.0.2",
        "process": oom_score()
        | {
            "user": {"uid": context.get("runAsUser", 0), "gid": 0},
            "args": ["kproxy", *arguments],
            "env": [f"{name}={value}" for name, value in given.items()],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": not context.get("allowPrivilegeEscalation", True),
        },
        "root": {"path": str(root), "readonly": context["readOnlyRootFilesystem"]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [] if privileged else ["ro"]},
            *(_bind(of, place, source) for place, source in mounts.items()),
        ],
        "linux": linux,
    }


def image_environment() -> dict[str, str]:
    """Return what the last stage of the Dockerfile puts into the environment."""
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM scratch\n")[1]
    lines = re.sub(r"\\\n\s*", "", stage).splitlines()
    words = [word for line in lines if line.startswith("ENV ") for word in line.split()[1:]]
    return dict(word.split("=", 1) for word in words)


def oom_score() -> Object:
    """Return what the kubelet sets for Pods critical to a node, where this process may: it takes a capability."""
    return {"oomScoreAdj": -997} if "CAP_SYS_RESOURCE" in held() else {}


def held() -> list[str]:
    """Return the capabilities that this process can give away."""
    status = Path("/proc/self/status").read_text()
    bits = int(status.split("CapEff:")[1].split()[0], 16)
    return [f"CAP_{name}" for number, name in enumerate(NAMES.split()) if bits >> number & 1]


def seccomp(capabilities: list[str]) -> Object:
    """Return the profile for a container with these capabilities, in the OCI's form."""
    profile = json.loads(SECCOMP.read_text())
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]

    def applies(rule: Object) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        wanted = set(includes.get("caps", capabilities)) <= set(capabilities)
        return (
            wanted
            and architecture in includes.get("arches", [architecture])
            and not set(excludes.get("caps", ())) & set(capabilities)
        )

    rules = [
        {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        for rule in profile["syscalls"]
        if applies(rule)
    ]
    names = {"amd64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "arm64": ["SCMP_ARCH_AARCH64"]}
    return {"defaultAction": profile["defaultAction"], "architectures": names[architecture], "syscalls": rules}


def _bind(of: Object, place: str, source: Path) -> Object:
    writable = any(item["mountPath"] == place and not item.get("readOnly") for item in of["volumeMounts"])
    return {
        "destination": place,
        "type": "bind",
        "source": str(source),
        "options": ["bind", "rw" if writable else "ro"],
    }
