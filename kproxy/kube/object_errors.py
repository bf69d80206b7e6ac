"""From the decoder's complaint about an object to the exact field and one readable sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

from kproxy.kube.objects import ObjectError
from kproxy.kube.remarks import FieldPath as Path
from kproxy.model.types import Protocol

Decode: TypeAlias = Callable[[dict[str, Any]], object]

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]|(\[\.\.\.\])")
_ANY = object()
"""The step `[...]`: some element of a list or mapping, the complaint does not say which."""


def explain(error: ObjectError, data: Any, decode: Decode) -> tuple[Path, str]:
    """Return the path of the field that an object was refused for, and what is wrong with it.

    `data` is the object as parsed; `decode` is what refused it, called again to find out which of several
    elements is meant.
    """
    match = _PLACE.match(str(error))
    assert match is not None
    what = match["what"]
    if what.startswith("Invalid enum value"):
        what += f", expected one of {', '.join(get_args(Protocol))}"
    if match["key"]:
        what = f"{what} as a key"
    steps = [name or (int(index) if index else _ANY) for name, index, _ in _STEP.findall(match["path"] or "")]
    return _resolve(steps, data, decode, str(error)), what[:1].lower() + what[1:]


def _resolve(steps: list[Any], data: Any, decode: Decode, complaint: str) -> Path:
    """Replace each unknown step: it is the element that alone, without its siblings, brings the complaint."""
    real: list[str | int] = []
    here: list[str | int] = []
    for step in steps:
        if step is not _ANY:
            real.append(step)
            here.append(step)
            continue
        found = _guilty(data, here, decode, complaint)
        if found is None:
            break
        key, data = found
        real.append(key)
        here.append(key if isinstance(key, str) else 0)
    return tuple(real)


def _guilty(
    data: Any, path: list[str | int], decode: Decode, complaint: str
) -> tuple[str | int, dict[str, Any]] | None:
    container = _at(data, path)
    if isinstance(container, list):
        alone: list[tuple[str | int, Any]] = [(index, [element]) for index, element in enumerate(container)]
    elif isinstance(container, dict):
        alone = [(key, {key: element}) for key, element in container.items()]
    else:
        alone = []
    for key, only in alone:
        candidate = _replaced(data, path, only)
        try:
            decode(candidate)
        except ObjectError as error:
            if str(error) == complaint:
                return key, candidate
    return None


def _at(data: Any, path: list[str | int]) -> Any:
    for step in path:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def _replaced(data: Any, path: list[str | int], value: Any) -> Any:
    if not path:
        return value
    copy = data.copy()
    copy[path[0]] = _replaced(data[path[0]], path[1:], value)
    return copy
