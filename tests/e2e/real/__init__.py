"""A real cluster under test, reached only through its API server.

No docker, no ssh, no kubectl: privileged pods do what has to be done on nodes.
"""

from __future__ import annotations

from tests.e2e.real.clusters import RealClusters
from tests.e2e.real.objects import DEFAULT_IMAGE

__all__ = ["DEFAULT_IMAGE", "RealClusters"]
