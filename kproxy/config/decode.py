"""From parsed data to sections of the configuration, and back. Errors name field, value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from kproxy.config.types import FlushSeconds, Quantity, Seconds
from kproxy.documents.document import field_path_text

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
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_WHOLE = re.compile(rf"([-+]?)(?:0|((?:{_PART.pattern})+))")
_LONGEST_TEXT = 100
_MOST = 2**63 - 1
"""Nanoseconds in the longest duration that Go can hold, some 292 years."""


def parse_duration(text: str) -> float:
    """Return the seconds that a duration stands for. Raises `ValueError` for what Go refuses."""
    match = _WHOLE.fullmatch(text)
    if match is None or len(text) > _LONGEST_TEXT:
        raise ValueError(f"{text!r} is no duration")
    parts = _PART.findall(match[2] or "")
    nanoseconds = sum(round(float(number) * _UNITS[unit]) for number, unit in parts)
    if nanoseconds > _MOST:
        raise ValueError(f"{text!r} is no duration")
    return (-nanoseconds if match[1] == "-" else nanoseconds) / 1e9


def format_duration(seconds: float) -> str:
    """Return a duration as Go prints it: 90.0 is `1m30s`, 0.25 is `250ms`."""
    sign, rest = ("-", -seconds) if seconds < 0 else ("", seconds)
    nanoseconds = round(rest * 1e9)
    if nanoseconds == 0:
        return "0s"
    for unit in ("ns", "µs", "ms"):
        if nanoseconds < 1000 * _UNITS[unit]:
            return f"{sign}{_decimal(nanoseconds, _UNITS[unit])}{unit}"
    minutes, nanoseconds = divmod(nanoseconds, _UNITS["m"])
    hours, minutes = divmod(minutes, 60)
    large = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{large}{_decimal(nanoseconds, _UNITS['s'])}s"


def _decimal(nanoseconds: int, unit: int) -> str:
    whole, fraction = divmod(nanoseconds, unit)
    digits = str(fraction).zfill(len(str(unit)) - 1).rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


Path: TypeAlias = tuple[str | int, ...]
"""The keys and indexes that lead to a field, as the file spells them."""
Place: TypeAlias = Callable[[Path], str]
"""Says where a field was set: in which line of which file, or by which flag."""
_S = TypeVar("_S", bound=Struct)
_SHOWN = 80
_LARGEST = 3.4e38  # of Go's float32
_QUANTITY = re.compile(r"\d+(\.\d*)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for its author."""


def must_be(where: str, allowed: str, value: object) -> ConfigError:
    """Return the error for a value that is not allowed."""
    return ConfigError(f"{where}: must be {allowed}, not {show(value)}")


def show(value: object) -> str:
    """Return a value as JSON, cut to a readable length."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):  # keys that JSON cannot have, lone surrogates, cycles
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def decode(shape: type[_S], data: object, place: Place, at: Path = ()) -> _S:
    """Return data as a section. Fields that are not in it have their defaults. Raises `ConfigError`.

    The data must have no fields but those of the section (see `kproxy.config.decode.known_fields`).
    """
    if not isinstance(data, dict):
        raise must_be(place(at), "a mapping", data)
    hints = get_type_hints(shape, include_extras=True)
    names = {item.encode_name: item.name for item in msgspec.structs.fields(shape)}
    return shape(**{names[key]: _value(hints[names[key]], value, place, (*at, key)) for key, value in data.items()})


def encode(value: object) -> Any:
    """Return a section as data that `decode` reads: dicts, lists and scalars."""
    if isinstance(value, Struct):
        fields = msgspec.structs.fields(type(value))
        return {item.encode_name: encode(getattr(value, item.name)) for item in fields}
    if isinstance(value, Seconds):
        return format_duration(value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Quantity) else value


def _value(wanted: Any, value: object, place: Place, at: Path) -> object:
    limits = Meta()
    if get_origin(wanted) is Annotated:
        wanted, limits = get_args(wanted)
    origin = get_origin(wanted)
    if origin is Literal:
        if value not in get_args(wanted):
            raise must_be(place(at), " or ".join(word or '""' for word in get_args(wanted)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise must_be(place(at), "a list", value)
        return tuple(_value(get_args(wanted)[0], item, place, (*at, index)) for index, item in enumerate(value))
    if origin is Mapping:
        return _switches(value, place, at)
    if issubclass(wanted, Struct):
        return decode(wanted, value, place, at)
    return _scalar(wanted, limits, value, place, at)


def _switches(value: object, place: Place, at: Path) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise must_be(place(at), "a mapping", value)
    given = {name: on for name, on in value.items() if on is not None}
    for name, on in given.items():
        if not isinstance(name, str) or not isinstance(on, bool):
            raise must_be(place((*at, str(name))), "true or false", on)
    return given


def _scalar(wanted: Any, limits: Meta, value: object, place: Place, at: Path) -> object:
    read, allowed = _SCALARS[wanted]
    found = read(value)
    if found is None or not _within(found, limits):
        raise must_be(place(at), allowed + _limits_text(limits), value)
    return found


def _within(value: Any, limits: Meta) -> bool:
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
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
    found = _seconds(value) if nanoseconds is None else nanoseconds / 1e9
    return None if found is None or found < 0 else FlushSeconds(found)


def _quantity(value: object) -> Quantity | None:
    text = value if isinstance(value, str) else str(_integer(value))
    return Quantity(text) if _QUANTITY.fullmatch(text) else None


_DURATION = "a duration (such as 30s or 1m30s)"
_SCALARS: dict[type, tuple[Callable[[object], Any], str]] = {
    bool: (_boolean, "true or false"),
    int: (_integer, "a whole number"),
    float: (_number, "a number"),
    str: (_string, "a string"),
    Seconds: (_seconds, _DURATION),
    FlushSeconds: (_flush_seconds, f"{_DURATION} or a number of nanoseconds"),
    Quantity: (_quantity, "an amount (such as 0 or 64Ki)"),
}
REMOVED = frozenset({"conntrack.max", "logging.sanitization", "resourceContainer", "udpIdleTimeout"})
"""Fields that earlier versions of kube-proxy had and published files still have."""
IGNORED = "ignored"


class ConfigProblem(Struct, frozen=True):
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
    shape: type[Struct], data: Mapping[Any, Any], place: Place, problems: list[ConfigProblem], at: Path = ()
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
            problems.append(ConfigProblem(f"{place(path)}: {_what_is_wrong(path, names)}"))
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


def _known_value(wanted: Any, value: object, place: Place, problems: list[ConfigProblem], at: Path) -> object:
    if get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if get_origin(wanted) is tuple and isinstance(value, list):
        (item, *_) = get_args(wanted)
        return [_known_value(item, each, place, problems, (*at, index)) for index, each in enumerate(value)]
    if isinstance(wanted, type) and issubclass(wanted, Struct) and isinstance(value, dict):
        return known_fields(wanted, value, place, problems, at)
    return value


def _what_is_wrong(path: Path, names: Mapping[str, object]) -> str:
    if field_path_text(path) in REMOVED:
        return "no longer a field of kube-proxy's configuration"
    from difflib import get_close_matches  # noqa: PLC0415 - slow to load, and needed only here

    close = get_close_matches(str(path[-1]), names, 1)
    return f"unknown field; did you mean {close[0]}?" if close else "unknown field"


def _paths_to(wanted: object, data: object, at: Path = ()) -> list[Path]:
    if data is wanted:
        return [at]
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for step, child in children for path in _paths_to(wanted, child, (*at, step))]
