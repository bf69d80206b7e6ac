"""What the lab needs of the machine, and what to tell a human where it is missing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys

from tests.lab.namespace import Namespace
from tests.lab.servers import SOCKET_TYPES

PACKAGES = {
    "iptables": "iptables",
    "iptables-save": "iptables",
    "ip6tables": "iptables",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
"""Commands, with the Debian package that each is in."""

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
"""Runs a command as an ordinary user."""


def missing_commands(path: str | None = None) -> str:
    """Return one line that says what to install, or "" if everything is in `path` (by default $PATH)."""
    absent = [command for command in PACKAGES if shutil.which(command, path=path) is None]
    if not absent:
        return ""
    packages = " ".join(dict.fromkeys(PACKAGES[command] for command in absent))
    return f"{', '.join(absent)} not found: install it with `apt-get install {packages}` (as root)"


def missing_privilege() -> str:
    """Return one line that says why network namespaces cannot be made here, or ""."""
    try:
        Namespace("probe").close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def missing_access(*starter: str) -> str:
    """Return one line that says why an ordinary user cannot run the Python of these tests, or "".

    Without a `starter`, setpriv executes it while it still has root's capabilities; those are gone if that is another
    program, such as `sh -c 'exec "$0" "$@"'`.
    """
    command = [*NOBODY, *starter, sys.executable, "-c", "import kproxy, rich"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return f"an ordinary user may not run {sys.executable}"
    return ""


def missing_protocol(protocol: str) -> str:
    """Return one line that says why the kernel has no sockets of this protocol, or ""."""
    try:
        socket.socket(socket.AF_INET, *SOCKET_TYPES[protocol]).close()
    except OSError as error:
        return f"no {protocol} sockets in this kernel: {error.strerror}"
    return ""
