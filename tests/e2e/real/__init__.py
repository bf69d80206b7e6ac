"""The end-to-end tests' cluster where it is a real one, reached through its API alone.

No docker, no ssh, no kubectl: what has to happen on a node is done by a privileged pod on it.
"""

from __future__ import annotations

from tests.e2e.real.clusters import RealClusters
from tests.e2e.real.objects import DEFAULT_IMAGE

__all__ = ["DEFAULT_IMAGE", "RealClusters"]
