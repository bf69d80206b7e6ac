"""The objects of a cluster that the caller of a command may read, as they are passed on to another node. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.cluster_objects import KIND_TYPES, ClusterObjects, cluster_objects
from kproxy.kube.codec.conversion import TRIGGER_TIME_ANNOTATION

MAX_BYTES = 16 << 20
"""The maximum size of `encode_objects`. The command that decodes it may share the memory limit of the daemon."""
FieldTree: TypeAlias = "dict[str, FieldTree] | None"
"""The fields of an object to keep, with those of its parts. None keeps the whole value."""
_REDUCED: dict[str, FieldTree] = {
    "annotations": {TRIGGER_TIME_ANNOTATION: None},
    "readinessProbe": {},
    "startupProbe": {},
    "running": {},
}
"""Fields of which only a part matters, or whether they exist. The rest can be large, or confidential."""


class CallerObjectsError(Exception):
    """The text is not what `encode_objects` returns. The message is one line."""


class CallerObjects(Struct, frozen=True):
    """The objects about one Service that could be read.

    `source` says whose access was used. `objects` are as the API server sends them, with their kinds; None if neither
    the Service nor its EndpointSlices could be read. `seen` are the kinds that were read completely. `problems` has one
    line for each list that could not be read.
    """

    source: str
    objects: list[dict[str, Any]] | None = None
    seen: list[str] = []
    problems: list[str] = []

    def decoded(self) -> ClusterObjects | None:
        """Return the objects with the fields that explain a Service."""
        return None if self.objects is None else cluster_objects(self.objects, self.seen)


def encode_objects(found: CallerObjects, key: str, limit: int = MAX_BYTES) -> bytes:
    """Return the objects as one line of JSON of at most `limit` bytes.

    They have only the fields that `kproxy explain` uses. If there are too many of them, kinds are omitted, those that
    need most space first, and `problems` says so. The Service `key` itself always remains.
    """
    if found.objects is None:
        return _line(found)
    found = replace(found, objects=[_reduced(each, _fields(str(each.get("kind")))) for each in found.objects])
    while found.objects is not None and len(_line(found)) > limit:
        found = _without_largest_kind(found, key)
    return _line(found)


def decode_objects(line: bytes) -> CallerObjects:
    """Return what was encoded. Raises `CallerObjectsError`."""
    try:
        return msgspec.json.decode(line, type=CallerObjects)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CallerObjectsError(f"not written by kubectl kproxy: {error}") from None


def _line(found: CallerObjects) -> bytes:
    return msgspec.json.encode(found) + b"\n"


def _without_largest_kind(found: CallerObjects, key: str) -> CallerObjects:
    sizes: dict[str, int] = {}
    optional = [each for each in found.objects or () if not _is_service(each, key)]
    for each in optional:
        sizes[str(each.get("kind"))] = sizes.get(str(each.get("kind")), 0) + len(msgspec.json.encode(each))
    if not sizes:
        return CallerObjects(found.source, problems=[f"Service {key} is too large"])
    kind = max(sizes, key=lambda each: sizes[each])
    problem = f"{kind} objects: omitted, because they have {sizes[kind] / (1 << 20):.1f} MiB"
    return replace(
        found,
        objects=[each for each in found.objects or () if each.get("kind") != kind or _is_service(each, key)],
        seen=[each for each in found.seen if each != kind],
        problems=[*found.problems, problem],
    )


def _is_service(each: Mapping[str, Any], key: str) -> bool:
    metadata = each.get("metadata")
    names = metadata if isinstance(metadata, dict) else {}
    return each.get("kind") == "Service" and f"{names.get('namespace')}/{names.get('name')}" == key


# The fields that are kept: those that the types in which objects are decoded have


def _reduced(value: Any, fields: FieldTree) -> Any:
    """Return a value with these fields only. Values of unexpected types remain: they are what a command explains."""
    if fields is None:
        return value
    if isinstance(value, list):
        return [_reduced(each, fields) for each in value]
    if isinstance(value, dict):
        return {name: _reduced(each, fields[name]) for name, each in value.items() if name in fields}
    return value


@cache
def _fields(kind: str) -> FieldTree:
    fields = _merged(_fields_of(msgspec.inspect.type_info(each)) for each in KIND_TYPES.get(kind, ()))
    return {**(fields or {}), "kind": None}


def _fields_of(info: msgspec.inspect.Type) -> FieldTree:
    if isinstance(info, msgspec.inspect.StructType):
        return {
            each.encode_name: _REDUCED[each.encode_name] if each.encode_name in _REDUCED else _fields_of(each.type)
            for each in info.fields
        }
    if isinstance(info, msgspec.inspect.UnionType):
        return _merged(_fields_of(each) for each in info.types if not isinstance(each, msgspec.inspect.NoneType))
    return _fields_of(info.item_type) if isinstance(info, msgspec.inspect.ListType) else None


def _merged(trees: Iterable[FieldTree]) -> FieldTree:
    found: dict[str, FieldTree] = {}
    for tree in trees:
        if tree is None:
            return None
        for name, fields in tree.items():
            found[name] = _merged((found[name], fields)) if name in found else fields
    return found
