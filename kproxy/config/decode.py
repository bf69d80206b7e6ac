"""Decode and encode configuration sections, find unknown fields, and parse durations in Go's syntax.

Errors for invalid values name the field, the allowed values and the actual value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct

from kproxy.config.types import FlushSeconds, Quantity, Seconds
from kproxy.documents.document import FieldPath, field_path_text, format_value

Locate: TypeAlias = Callable[[FieldPath], str]
"""Returns the place where a field was set, for use in messages: `file:line: field`, or a flag."""
REMOVED_FIELDS = frozenset({"conntrack.max", "logging.sanitization", "resourceContainer", "udpIdleTimeout"})
"""Fields that kube-proxy no longer has, but that occur in published configuration files."""
_S = TypeVar("_S", bound=Struct)
_MAX_FLOAT32 = 3.4e38
_QUANTITY = re.compile(r"\d+(\.\d*)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([-+]?)(?:0|((?:{_DURATION_PART.pattern})+))")
_MAX_DURATION_TEXT = 100
_MAX_NANOSECONDS = 2**63 - 1
"""The longest duration that Go can represent, about 292 years."""


class ConfigError(ValueError):
    """An invalid configuration. The message has one line for each problem, written for the configuration's author."""


class ConfigProblem(Struct, frozen=True):
    """A problem that kube-proxy's strict decoder rejects and its lenient decoder tolerates.

    `text` is one line. `consequence` says what the lenient decoder does instead, such as "ignored".
    """

    text: str
    consequence: str = "ignored"

    @property
    def warning(self) -> str:
        """The log message if the configuration is decoded leniently."""
        return f"{self.text} ({self.consequence})"


def must_be(location: str, allowed: str, value: object) -> ConfigError:
    """Return the error for a value that is not allowed."""
    return ConfigError(f"{location}: must be {allowed}, not {format_value(value)}")


def decode(section: type[_S], data: object, locate: Locate, path: FieldPath = ()) -> _S:
    """Decode data into a section of the configuration. Missing fields get their default values.

    The data must not contain unknown fields: `known_fields` removes them. Raises `ConfigError` for an invalid value.
    """
    if not isinstance(data, dict):
        raise must_be(locate(path), "a mapping", data)
    hints = _types(section)
    names = dict(zip(section.__struct_encode_fields__, section.__struct_fields__, strict=True))
    values = {names[key]: _value(hints[names[key]], value, locate, (*path, key)) for key, value in data.items()}
    return section(**values)


def encode(value: object) -> Any:
    """Convert a section, or the value of a field, to data that `decode` accepts: dicts, lists and scalars."""
    if isinstance(value, Struct):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        return {name: encode(getattr(value, field)) for name, field in names}
    if isinstance(value, Seconds):
        return format_duration(value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Quantity) else value


def known_fields(
    section: type[Struct], data: Mapping[Any, Any], locate: Locate, problems: list[ConfigProblem], path: FieldPath = ()
) -> dict[str, Any]:
    """Return the data without unknown fields. Add a problem to `problems` for each unknown field.

    Fields of nested sections are checked too. Field names are case-sensitive, as in kube-proxy. Values are not checked.
    """
    hints = _types(section)
    names = zip(section.__struct_encode_fields__, section.__struct_fields__, strict=True)
    types = {name: hints[field] for name, field in names}
    known = {}
    for key, value in data.items():
        field = (*path, str(key))
        if key in types:
            known[key] = _known_value(types[key], value, locate, problems, field)
        else:
            problems.append(ConfigProblem(f"{locate(field)}: {_unknown_field_text(field, types)}"))
    return known


@cache
def _types(section: type[Struct]) -> Mapping[str, Any]:
    """Return the types of a section's fields by name. Python compiles every annotation to find them."""
    return get_type_hints(section, include_extras=True)


def duplicate_json_keys(text: bytes) -> list[FieldPath]:
    """Return the path of each key that occurs more than once in the same JSON object.

    The text must be valid JSON. Parsers use the last value of a duplicate key.
    """
    import json  # noqa: PLC0415 - few configurations are JSON

    duplicates: list[tuple[dict[str, Any], str]] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            duplicates.extend((made, name) for name in made if names.count(name) > 1)
        return made

    root = json.loads(text, object_pairs_hook=make_object)
    return [(*path, name) for parent, name in duplicates for path in _paths_to(parent, root)]


def parse_duration(text: str) -> float:
    """Parse a duration such as `1m30s`. Return seconds.

    Raises `ValueError` if Go's parser rejects the text, or if the text has more than 100 characters.
    """
    match = _DURATION.fullmatch(text)
    if match is None or len(text) > _MAX_DURATION_TEXT:
        raise ValueError(f"{text!r} is not a duration")
    parts = _DURATION_PART.findall(match[2] or "")
    nanoseconds = sum(round(float(number) * _UNITS[unit]) for number, unit in parts)
    if nanoseconds > _MAX_NANOSECONDS:
        raise ValueError(f"{text!r} is not a duration")
    return (-nanoseconds if match[1] == "-" else nanoseconds) / 1e9


def format_duration(seconds: float) -> str:
    """Format seconds as Go formats a duration: 90.0 is `1m30s`, 0.25 is `250ms`."""
    sign, absolute = ("-", -seconds) if seconds < 0 else ("", seconds)
    nanoseconds = round(absolute * 1e9)
    if nanoseconds == 0:
        return "0s"
    for unit in ("ns", "µs", "ms"):
        if nanoseconds < 1000 * _UNITS[unit]:
            return f"{sign}{_decimal(nanoseconds, _UNITS[unit])}{unit}"
    minutes, nanoseconds = divmod(nanoseconds, _UNITS["m"])
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{prefix}{_decimal(nanoseconds, _UNITS['s'])}s"


def _decimal(nanoseconds: int, unit: int) -> str:
    whole, fraction = divmod(nanoseconds, unit)
    digits = str(fraction).zfill(len(str(unit)) - 1).rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def _value(expected: Any, value: object, locate: Locate, path: FieldPath) -> object:
    limits = Meta()
    if get_origin(expected) is Annotated:
        expected, limits = get_args(expected)
    origin = get_origin(expected)
    if origin is Literal:
        if value not in get_args(expected):
            raise must_be(locate(path), _choices_text(get_args(expected)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise must_be(locate(path), "a list", value)
        item_type = get_args(expected)[0]
        return tuple(_value(item_type, item, locate, (*path, index)) for index, item in enumerate(value))
    if origin is Mapping:
        return _switches(value, locate, path)
    if issubclass(expected, Struct):
        return decode(expected, value, locate, path)
    return _scalar(expected, limits, value, locate, path)


def _choices_text(choices: tuple[str, ...]) -> str:
    *others, last = (choice or '""' for choice in choices)
    return f"{', '.join(others)} or {last}"


def _switches(value: object, locate: Locate, path: FieldPath) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise must_be(locate(path), "a mapping", value)
    switches = {name: enabled for name, enabled in value.items() if enabled is not None}
    for name, enabled in switches.items():
        if not isinstance(name, str) or not isinstance(enabled, bool):
            raise must_be(locate((*path, str(name))), "true or false", enabled)
    return switches


def _scalar(expected: Any, limits: Meta, value: object, locate: Locate, path: FieldPath) -> object:
    convert, allowed = _SCALARS[expected]
    converted = convert(value)
    if converted is None or not _is_within(converted, limits):
        raise must_be(locate(path), allowed + _limits_text(limits), value)
    return converted


def _is_within(value: Any, limits: Meta) -> bool:
    above = (limits.ge is None or value >= limits.ge) and (limits.gt is None or value > limits.gt)
    return above and (limits.le is None or value <= limits.le)


def _limits_text(limits: Meta) -> str:
    if limits.le is not None:
        return f" from {limits.ge} to {limits.le}"
    if limits.gt is not None:
        return f" greater than {limits.gt}"
    return f" of at least {limits.ge}" if limits.ge is not None else ""


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_FLOAT32 <= value <= _MAX_FLOAT32:
        return None
    return float(value)


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _seconds(value: object) -> Seconds | None:
    if isinstance(value, str):
        try:
            return Seconds(parse_duration(value))
        except ValueError:
            return None
    return Seconds(0) if _integer(value) == 0 else None


def _flush_seconds(value: object) -> FlushSeconds | None:
    nanoseconds = _integer(value)
    seconds = _seconds(value) if nanoseconds is None else nanoseconds / 1e9
    return None if seconds is None or seconds < 0 else FlushSeconds(seconds)


def _quantity(value: object) -> Quantity | None:
    text = value if isinstance(value, str) else str(_integer(value))
    return Quantity(text) if _QUANTITY.fullmatch(text) else None


_DURATION_TEXT = "a duration (such as 30s or 1m30s)"
_SCALARS: dict[type, tuple[Callable[[object], Any], str]] = {
    bool: (_boolean, "true or false"),
    int: (_integer, "an integer"),
    float: (_number, "a number"),
    str: (_string, "a string"),
    Seconds: (_seconds, _DURATION_TEXT),
    FlushSeconds: (_flush_seconds, f"{_DURATION_TEXT} or a number of nanoseconds"),
    Quantity: (_quantity, "a quantity (such as 0 or 64Ki)"),
}
"""For each scalar type, a function that converts a value, and a description of the allowed values for messages.

The function returns None if the value is invalid.
"""


def _known_value(
    expected: Any, value: object, locate: Locate, problems: list[ConfigProblem], path: FieldPath
) -> object:
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    if get_origin(expected) is tuple and isinstance(value, list):
        item_type = get_args(expected)[0]
        return [_known_value(item_type, item, locate, problems, (*path, index)) for index, item in enumerate(value)]
    if isinstance(expected, type) and issubclass(expected, Struct) and isinstance(value, dict):
        return known_fields(expected, value, locate, problems, path)
    return value


def _unknown_field_text(path: FieldPath, known: Mapping[str, object]) -> str:
    if field_path_text(path) in REMOVED_FIELDS:
        return "no longer a field of kube-proxy's configuration"
    from difflib import get_close_matches  # noqa: PLC0415 - slow to import, and rarely needed

    close = get_close_matches(str(path[-1]), known, 1)
    return f"unknown field; did you mean {close[0]}?" if close else "unknown field"


def _paths_to(target: object, data: object, path: FieldPath = ()) -> list[FieldPath]:
    if data is target:
        return [path]
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for step, child in children for found in _paths_to(target, child, (*path, step))]
