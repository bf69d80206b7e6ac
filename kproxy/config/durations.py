"""Durations as Go writes them: `30s`, `1h30m`, `250ms` (package time, functions ParseDuration and String)."""

from __future__ import annotations

import re

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
