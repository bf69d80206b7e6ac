"""From the text of a file to its JSON or YAML documents, with the line of every field.

The common case pays for nothing else: positions are looked up only once something is wrong, and files that
hold JSON never load PyYAML.
"""

from __future__ import annotations

import re

import msgspec

from kproxy.documents.document import Document, DocumentError, FieldPath

_BYTE_OFFSET = re.compile(r" \(byte (\d+)\)$")


def read_documents(text: bytes, *, json: bool = False, doubled_keys: bool = False) -> list[Document]:
    """Return the documents of a file that are not empty.

    `json` says that the file claims to be JSON (by its name), so that its syntax errors are JSON's. Other text
    may be YAML of several documents, or JSON. With `doubled_keys`, keys that YAML gives more than once in one mapping
    are named in the documents; otherwise they are an error. Raises `DocumentError`.
    """
    text = text.removeprefix(b"\xef\xbb\xbf")
    _check_encoding(text)
    if not text.strip():
        return []
    if json or text.lstrip().startswith(b"{"):
        try:
            return [_json_document(text)]
        except DocumentError:
            if json:
                raise
    from kproxy.documents.yaml_parser import read  # noqa: PLC0415 - only the first YAML text loads PyYAML

    return read(text.decode(), doubled_keys=doubled_keys)


def _check_encoding(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise DocumentError("not UTF-8 text", *_position(text, error.start)) from None


def _position(text: bytes, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count(b"\n") + 1, offset - (before.rfind(b"\n") + 1) + 1


def _json_document(text: bytes) -> Document:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        message = str(error).removeprefix("JSON is malformed: ")
        found = _BYTE_OFFSET.search(message)
        offset = int(found.group(1)) if found else len(text.rstrip())
        raise DocumentError(f"not valid JSON: {_BYTE_OFFSET.sub('', message)}", *_position(text, offset)) from None
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    return Document(text, lambda path: _line_in_json(text, path))


def _line_in_json(text: bytes, path: FieldPath) -> int:
    """Find a line by reading JSON as the YAML it nearly is: only tabs differ, and some escapes (then 0)."""
    from kproxy.documents.yaml_parser import line_in  # noqa: PLC0415 - as above

    return line_in(text.replace(b"\t", b" ").decode(), path)
