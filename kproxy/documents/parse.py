"""Split the text of a file into JSON or YAML documents, with the line number of each field. Pure.

Line numbers are computed only on request. A valid JSON file is parsed without PyYAML, which is loaded only if a line
number in the file is requested.
"""

from __future__ import annotations

import re

import msgspec

from kproxy.documents.document import Document, DocumentError, FieldPath

_BYTE_OFFSET = re.compile(r" \(byte (\d+)\)$")


def read_documents(text: bytes, *, json: bool = False, allow_duplicate_keys: bool = False) -> list[Document]:
    """Return the documents of a file, except empty documents. Raises `DocumentError`.

    If `json` is true, the text must be JSON, and error messages about its syntax refer to JSON. Otherwise the text may
    be JSON or one or more YAML documents. A key that occurs more than once in a YAML mapping is an error; with
    `allow_duplicate_keys`, it is instead listed in `Document.duplicate_keys`.
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
    from kproxy.documents.yaml_parser import read_yaml  # noqa: PLC0415 - loads PyYAML, which JSON files do not need

    return read_yaml(text.decode(), allow_duplicate_keys=allow_duplicate_keys)


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
        match = _BYTE_OFFSET.search(message)
        offset = int(match.group(1)) if match else len(text.rstrip())
        raise DocumentError(f"not valid JSON: {_BYTE_OFFSET.sub('', message)}", *_position(text, offset)) from None
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    return Document(text, lambda path: _line_in_json(text, path))


def _line_in_json(text: bytes, path: FieldPath) -> int:
    """Return the line of a field by parsing JSON as YAML.

    JSON is also valid YAML, with two exceptions: tabs, which are replaced with spaces, and some escape sequences. If
    the text contains an escape sequence that YAML does not have, the line is unknown (0).
    """
    from kproxy.documents.yaml_parser import line_in_yaml  # noqa: PLC0415 - as above

    return line_in_yaml(text.replace(b"\t", b" ").decode(), path)
