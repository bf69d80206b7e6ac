"""Decode the chunked transfer coding of HTTP (RFC 9112, section 7.1). Pure.

`http.client` decodes it as well, but takes several times as long for each chunk, and the API server sends each watch
event as a separate chunk.
"""

from __future__ import annotations

MAX_LINE_BYTES = 4096
"""Maximum size of a chunk's first line and of the trailer section, in bytes."""
_HEX_DIGITS = b"0123456789abcdefABCDEF"


class ChunkedDecoder:
    """Decodes one body, which it receives in pieces of any size."""

    def __init__(self) -> None:
        self.complete = False
        """Whether the whole body has been decoded."""
        self.excess = b""
        """What was received after the end of the body."""
        self.problem = ""
        """Why the rest of the body cannot be decoded, or "" if there is no problem."""
        self._rest = b""  # of a line, or of the line break after a chunk; always short
        self._size = 0  # number of bytes of the current chunk that have not been received
        self._in_chunk = False
        self._trailer_bytes = 0
        self._in_trailer = False

    def decode(self, data: bytes) -> bytes:
        """Return the content in the next piece of the body, up to its end or up to a `problem`."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        position, end = 0, len(data)
        pieces: list[bytes] = []
        while position < end and not (self.complete or self.problem):
            if self._in_chunk:
                stop = position + self._size
                if stop + 2 > end:
                    self._incomplete_chunk(data, position, pieces)
                    break
                if data[stop : stop + 2] != b"\r\n":
                    self.problem = "a chunk does not end with a line break"
                    break
                pieces.append(data[position:stop])
                position, self._in_chunk = stop + 2, False
                continue
            line_end = data.find(b"\n", position)
            if (line_end if line_end >= 0 else end) - position > MAX_LINE_BYTES:
                self.problem = "the first line of a chunk is too long"
                break
            if line_end < 0:
                self._rest = data[position:]
                break
            line = data[position:line_end]
            position = line_end + 1
            if self._in_trailer:
                self._trailer_line(line)
            else:
                self._chunk_line(line)
        if self.complete:
            self.excess += data[position:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _incomplete_chunk(self, data: bytes, position: int, pieces: list[bytes]) -> None:
        """Take what has been received of the current chunk. A part of its final line break is kept for later."""
        content = data[position : position + self._size]
        pieces.append(content)
        self._size -= len(content)
        self._rest = data[position + len(content) :]

    def _chunk_line(self, line: bytes) -> None:
        digits = line.strip()
        if b";" in digits:
            digits = digits.partition(b";")[0].strip()
        if not digits or digits.strip(_HEX_DIGITS) or len(digits) > 16:
            self.problem = "the size of a chunk is not a hexadecimal number"
            return
        self._size = int(digits, 16)
        self._in_chunk, self._in_trailer = self._size > 0, self._size == 0

    def _trailer_line(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 1
        if self._trailer_bytes > MAX_LINE_BYTES:
            self.problem = "the trailer section is too long"
        self.complete = line in {b"", b"\r"}
