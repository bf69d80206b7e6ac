"""Convert a container of a Pod to the OCI runtime configuration that the kubelet and containerd would pass to runc.

The format is that of the OCI runtime specification. Masked and read-only paths in /proc and the system calls of the
profile `RuntimeDefault` are containerd's defaults; Debian's golang-github-containers-common ships the same list.
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

CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
"""In the order of their numbers (linux/capability.h)."""


def configuration(
    container: Object,
    arguments: list[str],
    *,
    root: Path,
    mounts: dict[str, Path],
    environment: dict[str, str],
    network: str,
) -> Object:
    """Return the runtime configuration of a container.

    `root` is the root file system of the image, `mounts` maps mount paths to source paths, and `network` is the path of
    a network namespace.
    """
    context = container["securityContext"]
    privileged = context.get("privileged", False)
    capabilities = (
        effective_capabilities() if privileged else [f"CAP_{name}" for name in context["capabilities"]["add"]]
    )
    linux: dict[str, Any] = {
        "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "network", "path": network}]
    }
    if not privileged:
        linux |= {"maskedPaths": MASKED, "readonlyPaths": READ_ONLY, "seccomp": seccomp(capabilities)}
    variables = environment | image_environment()
    return {
        "ociVersion": "1.0.2",
        "process": oom_score()
        | {
            "user": {"uid": context.get("runAsUser", 0), "gid": 0},
            "args": ["kproxy", *arguments],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": not context.get("allowPrivilegeEscalation", True),
        },
        "root": {"path": str(root), "readonly": context["readOnlyRootFilesystem"]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [] if privileged else ["ro"]},
            *(_bind(container, path, source) for path, source in mounts.items()),
        ],
        "linux": linux,
    }


def image_environment() -> dict[str, str]:
    """Return the environment variables that the last stage of the Dockerfile sets."""
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM scratch\n")[1]
    lines = re.sub(r"\\\n\s*", "", stage).splitlines()
    words = [word for line in lines if line.startswith("ENV ") for word in line.split()[1:]]
    return dict(word.split("=", 1) for word in words)


def oom_score() -> Object:
    """Return the kubelet's OOM score for node-critical Pods, if this process has the capability to set it."""
    return {"oomScoreAdj": -997} if "CAP_SYS_RESOURCE" in effective_capabilities() else {}


def effective_capabilities() -> list[str]:
    """Return the capabilities of this process, which it can pass on."""
    status = Path("/proc/self/status").read_text()
    bits = int(status.split("CapEff:")[1].split()[0], 16)
    return [f"CAP_{name}" for number, name in enumerate(CAPABILITIES.split()) if bits >> number & 1]


def seccomp(capabilities: list[str]) -> Object:
    """Return the seccomp profile for a container with these capabilities, in OCI format."""
    profile = json.loads(SECCOMP.read_text())
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]

    def applies(rule: Object) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        return (
            set(includes.get("caps", capabilities)) <= set(capabilities)
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


def _bind(container: Object, path: str, source: Path) -> Object:
    writable = any(item["mountPath"] == path and not item.get("readOnly") for item in container["volumeMounts"])
    return {
        "destination": path,
        "type": "bind",
        "source": str(source),
        "options": ["bind", "rw" if writable else "ro"],
    }
