"""A private mount namespace for the demo, and a user namespace if it is not started by root.

The demo's files are on a tmpfs in its mount namespace. The kernel removes the tmpfs and the network namespaces with the
last process, even after SIGKILL.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.proxy import KPROXY
from tests.lab.requirements import missing_commands

MOUNT_POINTS = ("/run", "/mnt")
MOUNT = 'mount -t tmpfs -o mode=0755 kproxy-demo "$0" && exec "$@"'
AS_ROOT = ("unshare", "--mount")
AS_USER = ("unshare", "--user", "--map-root-user", "--mount")


def enter(module: str) -> str:
    """Replace this process with `python -m MODULE FOLDER`, where FOLDER is a new tmpfs.

    Returns only if that fails, with the reason.
    """
    # Debian installs iptables in a directory that is not in the PATH of ordinary users.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    problem = missing_commands(path)
    if problem:
        return problem
    if not Path(KPROXY).exists():
        return f"{KPROXY} not found: install kproxy into this Python environment with `pip install -e '.[dev]'`"
    os.environ["PATH"] = path
    folder = _mount_point((os.getcwd(), sys.prefix, sys.base_prefix))
    for unshare in (AS_ROOT, AS_USER) if os.geteuid() == 0 else (AS_USER,):
        prefix = [*unshare, "sh", "-c", MOUNT, folder]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            # By default, iptables-legacy locks a file in /run, which only root can write.
            environment = os.environ | {"XTABLES_LOCKFILE": f"{folder}/xtables.lock"}
            os.execvpe(prefix[0], [*prefix, sys.executable, "-m", module, folder], environment)
    if os.geteuid() == 0:
        return "root is not permitted to create namespaces: run the demo on the host or in a `--privileged` container"
    return "only root can create namespaces on this machine: run `sudo make demo`"


def _mount_point(needed: Sequence[str]) -> str:
    """Return a directory for the tmpfs that contains none of the needed paths."""
    resolved = [Path(path).resolve() for path in needed]
    for point in MOUNT_POINTS:
        if Path(point).is_dir() and not any(path.is_relative_to(point) for path in resolved):
            return point
    return MOUNT_POINTS[0]
