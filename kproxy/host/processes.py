"""Read the processes and the listening TCP sockets of this machine from /proc (proc(5))."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from kproxy.host.observed import ListeningSocket, ObservedProcess

MAX_ARGUMENTS = 64
"""Maximum number of words of a command line that are kept."""
_PROC = Path("/proc")
_LISTEN = "0A"
"""TCP_LISTEN (include/net/tcp_states.h) as /proc/net/tcp prints it."""
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The initial PID namespace of the kernel has a fixed number (PROC_PID_INIT_INO in linux/proc_ns.h)."""


def processes() -> tuple[ObservedProcess, ...]:
    """Return all processes that this process can see, itself and kernel threads excluded."""
    own = _link(_PROC / "thread-self/ns/net")
    found = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        folder = _PROC / str(pid)
        try:
            argv = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            name = (folder / "comm").read_text(errors="replace").strip()
        except OSError:
            continue  # the process has exited
        if argv == [""]:
            continue
        network = _link(folder / "ns/net")
        found.append(ObservedProcess(pid, name, tuple(argv[:MAX_ARGUMENTS]), network == own if network else None))
    return tuple(found)


def in_initial_pid_namespace() -> bool:
    """Return whether this process can see all processes of the machine."""
    return _link(_PROC / "self/ns/pid") == _INITIAL_PID_NAMESPACE


def listening_sockets() -> tuple[ListeningSocket, ...]:
    """Return the listening TCP sockets of this network namespace."""
    found: list[ListeningSocket] = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            found += parse_listening((_PROC / "thread-self/net" / name).read_text())
    return tuple(found)


def parse_listening(text: str) -> Iterator[ListeningSocket]:
    """Yield the listening sockets in the content of /proc/net/tcp or /proc/net/tcp6."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN:
            address, _, port = fields[1].partition(":")
            yield ListeningSocket(_address(address), int(port, 16), int(fields[9]))


def socket_owners(inodes: Collection[int]) -> dict[int, int]:
    """Return the PID of a process that has each socket open. Sockets of other users' processes need root."""
    owners: dict[int, int] = {}
    for pid in _pids():
        with suppress(OSError):
            for entry in os.scandir(_PROC / str(pid) / "fd"):
                match = _SOCKET.fullmatch(_link(Path(entry.path)))
                if match and int(match[1]) in inodes:
                    owners[int(match[1])] = pid
        if len(owners) == len(inodes):
            break
    return owners


def open_file_limit(pid: int) -> int | None:
    """Return the soft limit of open files of a process, or None if it is unlimited or cannot be read."""
    with suppress(OSError):
        match = re.search(r"^Max open files +(\d+)", (_PROC / str(pid) / "limits").read_text(), re.MULTILINE)
        return int(match[1]) if match else None
    return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(_PROC) if name.isdecimal())


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _address(text: str) -> str:
    """Convert an address of /proc/net/tcp: 32-bit words in the byte order of the machine, in hexadecimal digits."""
    words = [int(text[begin : begin + 8], 16) for begin in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET6 if len(words) > 1 else socket.AF_INET, packed)
