"""An emulated cluster: network namespaces as nodes and pods, the test API server, a real kproxy on each node."""

from __future__ import annotations

from tests.lab.requirements import missing_commands, missing_privilege


def unavailable() -> str:
    """Return why this machine cannot run the cluster, in one line, or "" if it can."""
    return missing_commands() or missing_privilege()
