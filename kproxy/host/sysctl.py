"""Reading and writing kernel parameters under /proc/sys."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys")


def read_sysctl(name: str) -> str:
    """Return a parameter, named by its path such as `net/ipv4/ip_forward`. Raises `OSError` where it does not exist."""
    return (_ROOT / name).read_text().strip()


def ensure_sysctl(name: str, value: str) -> bool:
    """Set a parameter unless it already has that value; return whether it was written. Raises `OSError`."""
    if read_sysctl(name) == value:
        return False
    (_ROOT / name).write_text(value)
    return True
