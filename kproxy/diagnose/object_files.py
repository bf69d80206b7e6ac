"""Read the objects of a cluster from files, with the fields that explain why a Service does not work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from kproxy.diagnose.cluster_objects import ClusterObjects, cluster_objects, items
from kproxy.documents.document import DocumentError, FileProblem
from kproxy.documents.parse import read_documents
from kproxy.documents.watch import read_path


class ObjectFilesError(Exception):
    """Files cannot be read. The message has one line for each problem."""


def read_object_files(path: str) -> ClusterObjects:
    """Read all objects of a file or directory. If an object occurs more than once, the last one counts.

    Raises `ObjectFilesError` if a file cannot be read or is not YAML or JSON. Invalid objects are not an error here:
    they are what the command explains.
    """
    snapshot = read_path(path)
    problems = [snapshot.problem] if snapshot.problem is not None else []
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, text in snapshot.files.items():
        if isinstance(text, FileProblem):
            problems.append(text)
            continue
        try:
            for each in _objects(text):
                found[_identity(each)] = each
        except DocumentError as error:
            problems.append(FileProblem(name, str(error), error.line, error.column))
    if problems:
        raise ObjectFilesError("\n".join(map(str, problems)))
    return cluster_objects(found.values())


def _objects(text: bytes) -> Iterator[dict[str, Any]]:
    for document in read_documents(text):
        content = document.content
        yield from items(msgspec.json.decode(content) if isinstance(content, bytes) else content)


def _identity(each: dict[str, Any]) -> tuple[str, str, str]:
    metadata = each.get("metadata")
    names = metadata if isinstance(metadata, dict) else {}
    return str(each.get("kind")), str(names.get("namespace") or "default"), str(names.get("name"))
