"""A cluster on this machine: network namespaces as nodes and pods, the tests' API server, a real kproxy per node."""

from __future__ import annotations

from tests.lab.requirements import missing_commands, missing_privilege


def unavailable() -> str:
    """Return one line that says why there can be no such cluster on this machine, or ""."""
    return missing_commands() or missing_privilege()
