"""Watch a real packet with nftables' tracing, in a table of its own that disappears with this process.

The table belongs to the process `nft -i` that creates it (`flags owner`). That process ends as soon as its input does,
also if this process is killed, and the kernel then removes the table.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

from msgspec import Struct

from kproxy.diagnose.trace.kernel import KernelError
from kproxy.host.commands import CommandError, CommandRunner, run
from kproxy.model.types import Family, Protocol

TABLE = "kproxy-trace"
WINDOW_SECONDS = 3
"""How long each run of `nft monitor trace` lasts."""
WAIT_SECONDS = 30
"""How long to wait for a packet that somebody else sends."""
_ATTEMPT_SECONDS = 0.2
_EVENT = re.compile(r"trace id (\w+) (\w+) (\S+) (\S+) (rule|policy) (.*)")
_VERDICT = re.compile(r"\(verdict (\w+)(?: \S+)?\)\s*$")
_TYPES = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


class LiveEvent(Struct, frozen=True):
    """A rule that a packet has matched, or the policy of a base chain, with its verdict."""

    family: str
    table: str
    chain: str
    kind: str
    text: str
    verdict: str


class WatchedFlow(Struct, frozen=True, kw_only=True):
    """The packets to watch. If the node `sends` them, they are sent here."""

    family: Family
    source: str
    destination: str
    port: int
    protocol: Protocol
    sends: bool


def watch(flow: WatchedFlow) -> list[LiveEvent]:
    """Return what the kernel does with the first packet of a flow, or nothing if none came. Raises `KernelError`."""
    found: list[LiveEvent] = []

    def commands() -> Iterator[str]:
        yield _setup(flow)
        for _ in range(1 if flow.sends else WAIT_SECONDS // WINDOW_SECONDS):
            found.extend(_window(flow))
            if found:
                return
            yield "\n"  # shows that nft is not stuck, but waits for input

    try:
        done = CommandRunner().stream_input(["nft", "-i"], commands(), timeout=WAIT_SECONDS + 30)
    except CommandError as error:
        raise KernelError(f"cannot trace a real packet: {error}") from None
    if done.code or done.stderr.strip():  # `nft -i` exits with 0 even if it could not do anything
        raise KernelError(f"cannot trace a real packet: {done.error_message}")
    return found


def _setup(flow: WatchedFlow) -> str:
    address = "ip6" if flow.family is Family.IPV6 else "ip"
    opening = " tcp flags & (syn | ack) == syn" if flow.protocol == "TCP" else ""
    match = (
        f"{address} saddr {flow.source} {address} daddr {flow.destination} "
        f"{flow.protocol.lower()} dport {flow.port}{opening} meta nftrace set 1"
    )
    hook = "output" if flow.sends else "prerouting"
    return (
        f"add table inet {TABLE} {{ flags owner; }}\n"
        f"add chain inet {TABLE} {hook} {{ type filter hook {hook} priority -400; }}\n"
        f"add rule inet {TABLE} {hook} {match}\n"
    )


def _window(flow: WatchedFlow) -> list[LiveEvent]:
    """Run the monitor for a while, and return the events of the first packet."""
    ended = threading.Event()
    sender = threading.Thread(target=_send, args=(flow, ended), daemon=True)
    if flow.sends:
        sender.start()
    try:
        done = run(["timeout", str(WINDOW_SECONDS), "nft", "monitor", "trace"], timeout=WINDOW_SECONDS + 20)
    finally:
        ended.set()
    return first_packet(done.stdout)


def first_packet(text: str) -> list[LiveEvent]:
    """Return the events of the first packet in the output of `nft monitor trace`, without those of the own table.

    Packets that other tables trace have no event of the own table. They are skipped.
    """
    found: list[LiveEvent] = []
    first = ""
    for line in text.splitlines():
        event = _EVENT.match(line.strip())
        if not event or event[1] != (first or event[1]) or not (first or event[3] == TABLE):
            continue
        first = event[1]
        verdict = _VERDICT.search(event[6])
        decided = verdict[1] if verdict else event[6].strip() if event[5] == "policy" else ""
        if event[3] != TABLE:
            text_of_rule = _VERDICT.sub("", event[6]).strip()
            found.append(LiveEvent(event[2], event[3], event[4], event[5], text_of_rule, decided))
    return found


def _send(flow: WatchedFlow, ended: threading.Event) -> None:
    """Send packets of the flow until the monitor has ended: it takes an unknown time to begin."""
    kind = _TYPES.get(flow.protocol)
    while kind is not None and not ended.wait(_ATTEMPT_SECONDS):
        family = socket.AF_INET6 if flow.family is Family.IPV6 else socket.AF_INET
        with suppress(OSError), socket.socket(family, kind) as sending:
            sending.setblocking(False)
            sending.bind((flow.source, 0))
            sending.connect_ex((flow.destination, flow.port))
            if kind == socket.SOCK_DGRAM:
                sending.send(b"\n")
