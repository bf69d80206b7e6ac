"""From parsed data to sections of the configuration, and back. Errors name field, value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from kproxy.config.durations import format_duration, parse_duration
from kproxy.config.types import FlushSeconds, Quantity, Seconds

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

    The data must have no fields but those of the section (see `kproxy.config.fields.known_fields`).
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
