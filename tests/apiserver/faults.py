"""What goes wrong on demand: state that tests set and the server's threads obey."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

WatchListSupport = Literal["supported", "old-etcd", "forbidden", "ignored"]


@dataclass
class Refusing:
    """Requests to refuse with `status`: the next `times` whose path and query `matches` accepts."""

    status: int
    times: int
    retry_after: int | None
    matches: Callable[[str, dict[str, str]], bool]


@dataclass
class Faults:
    """`watch_list` says how sendInitialEvents is answered; `piece` cuts watch lines into such small writes.

    `withheld` has the resources (plural) that the server does not have or does not show, with the status that says so.
    `protobuf` says what becomes of a wish for it: "ignored" answers JSON, "refused" is a 406.
    `epoch` counts what `end` was asked to do: a watch that began in an earlier one ends as `ending` says.
    """

    watch_list: WatchListSupport = "supported"
    protobuf: Literal["supported", "ignored", "refused"] = "supported"
    service_fields: bool = True
    piece: int = 0
    epoch: int = 0
    withheld: dict[str, int] = field(default_factory=dict)
    ending: Literal["clean", "drop", "silent", "mid-line", "gone", "error"] = "clean"
    injected: list[bytes] = field(default_factory=list)
    refusing: list[Refusing] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_refusal(self, path: str, query: dict[str, str]) -> Refusing | None:
        with self.lock:
            for item in self.refusing:
                if item.times > 0 and item.matches(path, query):
                    item.times -= 1
                    return item
            return None
