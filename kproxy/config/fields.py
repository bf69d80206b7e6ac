"""Which fields of a file the configuration has, and what is wrong with the others. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from kproxy.config.decode import Path, Place
from kproxy.kube.remarks import dotted

REMOVED = frozenset({"conntrack.max", "logging.sanitization", "resourceContainer", "udpIdleTimeout"})
"""Fields that earlier versions of kube-proxy had and published files still have."""

IGNORED = "ignored"


class Problem(Struct, frozen=True):
    """Something that kube-proxy's strict decoder refuses and its lenient one passes over; both texts are one line.

    `consequence` says what becomes of it where it is passed over.
    """

    text: str
    consequence: str = IGNORED

    @property
    def warning(self) -> str:
        """The line for the log."""
        return f"{self.text} ({self.consequence})"


def known_fields(
    shape: type[Struct], data: Mapping[Any, Any], place: Place, problems: list[Problem], at: Path = ()
) -> dict[str, Any]:
    """Return the fields of a section that `shape` has, at any depth, and add the others to `problems`.

    Field names are case-sensitive, as they are to kube-proxy. Values are not looked at.
    """
    hints = get_type_hints(shape, include_extras=True)
    names = {item.encode_name: hints[item.name] for item in msgspec.structs.fields(shape)}
    known = {}
    for key, value in data.items():
        path = (*at, str(key))
        if key in names:
            known[key] = _known_value(names[key], value, place, problems, path)
        else:
            problems.append(Problem(f"{place(path)}: {_what_is_wrong(path, names)}"))
    return known


def doubled_in_json(text: bytes) -> list[Path]:
    """Return the keys that JSON text gives more than once in one object, of which its parsers keep the last."""
    import json  # noqa: PLC0415 - few configurations are JSON

    doubled: list[tuple[dict[str, Any], str]] = []

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            doubled.extend((found, name) for name in found if names.count(name) > 1)
        return found

    top = json.loads(text, object_pairs_hook=made)
    return [(*path, name) for holder, name in doubled for path in _paths_to(holder, top)]


def _known_value(wanted: Any, value: object, place: Place, problems: list[Problem], at: Path) -> object:
    if get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if get_origin(wanted) is tuple and isinstance(value, list):
        (item, *_) = get_args(wanted)
        return [_known_value(item, each, place, problems, (*at, index)) for index, each in enumerate(value)]
    if isinstance(wanted, type) and issubclass(wanted, Struct) and isinstance(value, dict):
        return known_fields(wanted, value, place, problems, at)
    return value


def _what_is_wrong(path: Path, names: Mapping[str, object]) -> str:
    if dotted(path) in REMOVED:
        return "no longer a field of kube-proxy's configuration"
    from difflib import get_close_matches  # noqa: PLC0415 - slow to load, and needed only here

    close = get_close_matches(str(path[-1]), names, 1)
    return f"unknown field; did you mean {close[0]}?" if close else "unknown field"


def _paths_to(wanted: object, data: object, at: Path = ()) -> list[Path]:
    if data is wanted:
        return [at]
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for step, child in children for path in _paths_to(wanted, child, (*at, step))]
