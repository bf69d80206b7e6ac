"""The heap of this process."""

from __future__ import annotations

import ctypes


def release_unused_memory() -> None:
    """Return heap memory that is not in use to the kernel.

    Programming a large cluster takes tens of megabytes that are not needed afterwards. glibc keeps most of them,
    because memory that is in use lies above them. Does nothing if the C library has no `malloc_trim`, such as musl.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
