"""Read what a trace needs from this node's kernel."""

from __future__ import annotations


class KernelError(Exception):
    """The kernel's state cannot be read. The message is one line."""
