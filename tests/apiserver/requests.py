"""The requests that a server received."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SeenRequest:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") in {"1", "true"}


class SeenRequests:
    def __init__(self) -> None:
        self._seen: list[SeenRequest] = []
        self._changed = threading.Condition()

    def add(self, request: SeenRequest) -> None:
        with self._changed:
            self._seen.append(request)
            self._changed.notify_all()

    def all(self) -> list[SeenRequest]:
        with self._changed:
            return list(self._seen)

    def wait_for(
        self, matches: Callable[[SeenRequest], bool], count: int = 1, *, timeout: float = 20.0
    ) -> list[SeenRequest]:
        """Return the matching requests as soon as there are `count` of them."""

        def matching() -> list[SeenRequest]:
            return [request for request in self._seen if matches(request)]

        with self._changed:
            if not self._changed.wait_for(lambda: len(matching()) >= count, timeout):
                raise TimeoutError(f"only {len(matching())} of {count} requests in {timeout} s: {self._seen}")
            return matching()
