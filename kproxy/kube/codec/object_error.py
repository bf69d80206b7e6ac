"""Errors about invalid objects, in terms of the Kubernetes API. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from kproxy.documents.document import FieldPath, field_path_text, format_value

_VALIDATION_ERROR = re.compile(
    r"(?:Expected `(?P<expected>[^`]*)`(?:, got `[^`]*`)?|Object missing required field `(?P<missing>[^`]*)`"
    r"|(?P<range>Integer value|Number) out of range)"
    r"(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?"
)
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]|(\[\.\.\.\])")
_JSON_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "array": ("a list", list),
    "bool": ("true or false", bool),
    "float": ("a number", (int, float)),
    "int": ("an integer", int),
    "null": ("null", type(None)),
    "object": ("a mapping", dict),
    "str": ("a string", str),
}
"""Maps msgspec's name of a JSON type to its name in errors and to the Python types of its values."""
_UNKNOWN = object()


class ObjectError(ValueError):
    """An object that cannot be decoded or used.

    `field` is the path of the invalid field, or () for the object itself. The message consists of the path and
    `problem`, for example `spec.ports[0].port must be an integer, not "http"`.
    """

    def __init__(self, problem: str, field: FieldPath = ()) -> None:
        super().__init__(f"{field_path_text(field)} {problem}".lstrip())
        self.problem = problem
        self.field = field


def must_be(expected: str, value: object, *field: str | int) -> ObjectError:
    """Return the error for a field with an invalid value."""
    return ObjectError(f"must be {expected}, not {format_value(value)}", field)


def explain(error: Exception, content: bytes | msgspec.Raw | Any) -> ObjectError:
    """Translate an error that msgspec raised while decoding `content`, which is JSON text or parsed data.

    The returned error quotes the invalid value from `content`, because msgspec's message does not contain the value.
    """
    if isinstance(error, RecursionError):
        return ObjectError("nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return ObjectError("not valid UTF-8")
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        reason = text.removeprefix("JSON is malformed: ")
        return ObjectError("not valid JSON: " + reason[:1].lower() + reason[1:])
    match = _VALIDATION_ERROR.fullmatch(text)
    return _invalid_field(match, _parsed(content)) if match else ObjectError(text)


def _invalid_field(match: re.Match[str], data: Any) -> ObjectError:
    field, value = _locate(match, data)
    if match["missing"]:
        return ObjectError("is missing", (*field, match["missing"]))
    if match["range"]:
        problem = "contains a number that is out of range" if "[...]" in (match["path"] or "") else "is out of range"
        return ObjectError(problem, field)
    if match["key"]:
        keys = value if isinstance(value, dict) else ()
        key = next((key for key in keys if not isinstance(key, str)), _UNKNOWN)
        return ObjectError(_requirement("have only strings as keys", key), field)
    expected, _ = _expected(match)
    return ObjectError(_requirement(f"be {expected}", value), field)


def _requirement(text: str, value: object) -> str:
    return f"must {text}" if value is _UNKNOWN else f"must {text}, not {format_value(value)}"


def _expected(match: re.Match[str]) -> tuple[str, type | tuple[type, ...]]:
    name = (match["expected"] or "").removesuffix(" | null")
    return _JSON_TYPES.get(name, (name, object))


def _parsed(content: bytes | msgspec.Raw | Any) -> Any:
    if not isinstance(content, bytes | msgspec.Raw):
        return content
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):  # the text is also malformed after the invalid field
        return _UNKNOWN


def _locate(match: re.Match[str], data: Any) -> tuple[FieldPath, Any]:
    """Return the path of the field that a msgspec error names, and the field's value.

    For a mapping with arbitrary keys, msgspec writes `[...]` instead of the key. The returned path then leads to
    the first value in that mapping whose type is wrong. The returned value is `_UNKNOWN` if it cannot be found.
    """
    _, types = _expected(match)
    path: list[str | int] = []
    for name, index, any_key in _STEP.findall(match["path"] or ""):
        step = name or (int(index) if index else "")
        if any_key:
            values = data if isinstance(data, dict) else {}
            invalid = [key for key, value in values.items() if not isinstance(value, types)]
            if not invalid:
                return tuple(path), _UNKNOWN
            step = invalid[0]
        path.append(step)
        data = _child(data, step)
    return tuple(path), data


def _child(data: Any, step: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(step, _UNKNOWN)
    return data[step] if isinstance(data, list) and isinstance(step, int) and step < len(data) else _UNKNOWN
