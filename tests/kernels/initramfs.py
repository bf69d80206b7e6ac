"""A minimal initramfs: a static busybox, a few modules, and the script that makes the host's files the guest's root."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Iterator
from pathlib import Path

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What the guest needs until it can read the host's files. The kernel loads all other modules itself."""


def initramfs(init: str, busybox: Path, modules: Path) -> bytes:
    """Return the compressed archive. `init` is the text of /init, a script for busybox; `modules` is a directory with
    the output of depmod."""
    archive = _Archive()
    for folder in ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "merged"):
        archive.add(folder, stat.S_IFDIR | 0o755, b"")
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    for number, path in enumerate(load_order(modules)):
        content = (modules / path).read_bytes()
        archive.add(f"modules/{number:03}", stat.S_IFREG | 0o644, _decompressed(path, content))
    return gzip.compress(archive.closed(), compresslevel=1)


def load_order(modules: Path) -> list[str]:
    """Return the paths of `MODULES` and the modules that they need, each after those that it needs.

    Modules that are built into the kernel are not in `modules.dep`, and need not be loaded.
    """
    needed_by = dict(_dependencies(modules / "modules.dep"))
    by_name = {_name(path): path for path in needed_by}
    order: dict[str, None] = {}
    for name in MODULES:
        if name in by_name:
            path = by_name[name]
            # depmod lists a module before those that it needs.
            order |= dict.fromkeys([*reversed(needed_by[path]), path])
    return list(order)


def _dependencies(path: Path) -> Iterator[tuple[str, list[str]]]:
    for line in path.read_text().splitlines():
        module, _, needed = line.partition(":")
        yield module, needed.split()


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _decompressed(path: str, content: bytes) -> bytes:
    return lzma.decompress(content) if path.endswith(".xz") else content


class _Archive:
    """A cpio archive in the format newc (Documentation/driver-api/early-userspace/buffer-format.rst in Linux)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, path: str, mode: int, content: bytes) -> None:
        """Add a file or a directory."""
        self._count += 1
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._count, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(head + name), _padded(content)]

    def closed(self) -> bytes:
        """Return the archive."""
        self.add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
