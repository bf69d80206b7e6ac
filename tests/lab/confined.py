"""`python -m tests.lab.confined PROFILE COMMAND...`: run a command under a seccomp filter.

PROFILE is a file in OCI format (see `tests.deploy.oci.seccomp`). The filter is loaded with libseccomp, as container
runtimes do, and also sets `no_new_privs`, as `allowPrivilegeEscalation: false` does.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_COMPARISONS = {name: number for number, name in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"), 1)}


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp` of libseccomp."""

    _fields_ = (
        ("index", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def missing_library() -> str:
    """Return why filters cannot be loaded, in one line, or ""."""
    return "" if ctypes.util.find_library("seccomp") else "libseccomp not found"


def load(profile: dict[str, Any]) -> None:
    """Confine this process to the system calls of a profile. Raises `OSError`."""
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"))
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_action(profile["defaultAction"], errno.ENOSYS))))
    for rule in profile["syscalls"]:
        action = _action(rule["action"], rule.get("errnoRet", errno.EPERM))
        comparisons = [
            _Comparison(
                each["index"],
                _COMPARISONS[each["op"].removeprefix("SCMP_CMP_")],
                each["value"],
                each.get("valueTwo", 0),
            )
            for each in rule.get("args") or ()
        ]
        array = (_Comparison * len(comparisons))(*comparisons)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == -1:  # unknown to this library
                continue
            code = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(comparisons), array)
            if code not in {0, -errno.EACCES, -errno.EDOM}:  # the action is the default; not on this architecture
                raise OSError(-code, f"{name}: {os.strerror(-code)}")
    code = library.seccomp_load(context)
    if code:
        raise OSError(-code, os.strerror(-code))


def _action(name: str, number: int) -> int:
    return _ALLOW if name == "SCMP_ACT_ALLOW" else _ERRNO | number


def main(arguments: Sequence[str]) -> None:
    """Load the filter and execute the command."""
    profile, *command = arguments
    load(json.loads(Path(profile).read_text()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
