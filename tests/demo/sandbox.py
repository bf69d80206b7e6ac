"""Private mounts, and as an ordinary user a private root: what the demo leaves behind goes with its process.

Its files are on a tmpfs that only its own mount namespace knows. So they are gone with it, even after a
kill -9, like its network namespaces.
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
    """Replace this process by `python -m MODULE FOLDER`, FOLDER being its own; return what is in the way."""
    # An ordinary user's PATH leaves out where Debian puts iptables.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    problem = missing_commands(path)
    if problem:
        return problem
    if not Path(KPROXY).exists():
        return f"{KPROXY} not found: install the project into this Python with `pip install -e '.[dev]'`"
    os.environ["PATH"] = path
    folder = _mount_point((os.getcwd(), sys.prefix, sys.base_prefix))
    for unshare in (AS_ROOT, AS_USER) if os.geteuid() == 0 else (AS_USER,):
        prefix = [*unshare, "sh", "-c", MOUNT, folder]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            # iptables-legacy locks a file in /run, which an ordinary user cannot write.
            environment = os.environ | {"XTABLES_LOCKFILE": f"{folder}/xtables.lock"}
            os.execvpe(prefix[0], [*prefix, sys.executable, "-m", module, folder], environment)
    if os.geteuid() == 0:
        return "this root may not make namespaces: run it in a container with `--privileged`, or on a machine"
    return "this kernel lets only root make namespaces: run it with `sudo make demo`"


def _mount_point(needed: Sequence[str]) -> str:
    """Return a folder to mount over that holds none of the needed ones."""
    resolved = [Path(path).resolve() for path in needed]
    for point in MOUNT_POINTS:
        if Path(point).is_dir() and not any(path.is_relative_to(point) for path in resolved):
            return point
    return MOUNT_POINTS[0]
