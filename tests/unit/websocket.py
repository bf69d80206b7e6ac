"""The server side of command execution in pods over a WebSocket (RFC 6455, subprotocol v4.channel.k8s.io)."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable

STDIN, STDOUT, STDERR, STATUS = range(4)
"""The channels of the subprotocol. The last one carries the status of the command when it exits."""
SUCCESS = json.dumps({"status": "Success"})
CLOSE = b"\x88\x02" + struct.pack(">H", 1000)
"""The frame that closes a connection normally."""

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_OPCODE_CLOSE = 8


def handshake_headers(key: str) -> dict[str, str]:
    """Return the headers of the response to a handshake with this `Sec-WebSocket-Key`."""
    accept = hashlib.sha1(key.encode() + _GUID).digest()
    return {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": base64.b64encode(accept).decode(),
        "Sec-WebSocket-Protocol": "v4.channel.k8s.io",
    }


def frame(channel: int, data: bytes) -> bytes:
    """Return an unmasked binary frame for a channel."""
    payload = bytes([channel]) + data
    return b"\x82\x7e" + struct.pack(">H", len(payload)) + payload


def read_stdin(read: Callable[[int], bytes]) -> bytes | None:
    """Read one frame of standard input: masked, less than 126 bytes. Return None when the client closes.

    `read` returns as many bytes as it is asked for, or fewer at the end of the stream.
    """
    head = read(2)
    if len(head) < 2 or head[0] & 0x0F == _OPCODE_CLOSE:
        return None
    mask = read(4)
    payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(read(head[1] & 0x7F)))
    assert payload[0] == STDIN
    return payload[1:]
