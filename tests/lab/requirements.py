"""Requirements of the lab, and messages for people when one is missing."""

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
"""Required commands and their Debian packages."""

UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
"""Command prefix that runs a command as an unprivileged user."""


def missing_commands(path: str | None = None) -> str:
    """Return what to install, in one line, or "" if every command is in `path` ($PATH by default)."""
    absent = [command for command in PACKAGES if shutil.which(command, path=path) is None]
    if not absent:
        return ""
    packages = " ".join(dict.fromkeys(PACKAGES[command] for command in absent))
    return f"{', '.join(absent)} not found: install it with `apt-get install {packages}` (as root)"


def missing_privilege() -> str:
    """Return why this process cannot create network namespaces, in one line, or "" if it can."""
    try:
        Namespace("probe").close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def missing_access(*starter: str) -> str:
    """Return why an unprivileged user cannot run the Python of these tests, in one line, or "" if they can.

    Without a `starter`, setpriv itself executes Python, while it still has root's capabilities. With one, such as
    `sh -c 'exec "$0" "$@"'`, they are gone by then.
    """
    command = [*UNPRIVILEGED, *starter, sys.executable, "-c", "import kproxy, rich"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return f"an unprivileged user cannot run {sys.executable}"
    return ""


def missing_protocol(protocol: str) -> str:
    """Return why the kernel has no sockets of this protocol, in one line, or "" if it has."""
    try:
        socket.socket(socket.AF_INET, *SOCKET_TYPES[protocol]).close()
    except OSError as error:
        return f"no {protocol} sockets in this kernel: {error.strerror}"
    return ""
