"""Heap memory that is not in use is returned to the kernel."""

from __future__ import annotations

from pathlib import Path

from kproxy.host.heap import release_unused_memory

PAGE = 4096


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_unused_memory_is_returned_to_the_kernel() -> None:
    blocks = [bytearray(40_000) for _ in range(1000)]
    kept = blocks[::100]  # above the memory that becomes unused, so that glibc does not return it
    del blocks
    before = resident()
    release_unused_memory()
    assert before - resident() > 10_000_000
    assert len(kept) == 10
