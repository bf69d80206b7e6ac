"""An API server in the test process: real HTTP/1.1 lists and watches, with faults on demand."""

from __future__ import annotations

from tests.apiserver.relay import Relay
from tests.apiserver.requests import SeenRequest
from tests.apiserver.server import ApiServer
from tests.apiserver.store import ConflictError, NotFoundError

__all__ = ["ApiServer", "ConflictError", "NotFoundError", "Relay", "SeenRequest"]
