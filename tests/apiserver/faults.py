"""Faults on demand: state that tests set and the server's threads read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

WatchListSupport = Literal["supported", "old-etcd", "forbidden", "ignored"]


@dataclass
class FailingRequests:
    """A rule: answer the next `times` requests whose path and query match with `status`."""

    status: int
    times: int
    retry_after: int | None
    matches: Callable[[str, dict[str, str]], bool]


@dataclass
class Faults:
    """The current faults.

    `watch_list` is the answer to sendInitialEvents. `protobuf` is the answer to clients that accept protobuf: "ignored"
    answers with JSON, "refused" with status 406. `piece` is the maximum size of one write on a watch (0: no limit).
    `hidden` maps resources (plural) that are unavailable to the status of the answer. `epoch` grows whenever all open
    watches are to end; `ending` is the way in which they end.
    """

    watch_list: WatchListSupport = "supported"
    protobuf: Literal["supported", "ignored", "refused"] = "supported"
    service_fields: bool = True
    piece: int = 0
    epoch: int = 0
    hidden: dict[str, int] = field(default_factory=dict)
    ending: Literal["clean", "drop", "silent", "mid-line", "gone", "error"] = "clean"
    injected: list[bytes] = field(default_factory=list)
    failing: list[FailingRequests] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_failure(self, path: str, query: dict[str, str]) -> FailingRequests | None:
        with self.lock:
            for item in self.failing:
                if item.times > 0 and item.matches(path, query):
                    item.times -= 1
                    return item
            return None
