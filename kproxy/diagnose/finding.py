"""A finding about a node: a reason code, how bad it is, what was seen, and what to do. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kproxy.diagnose.report import ReportPart

Severity: TypeAlias = Literal["error", "warning", "info", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info", "ok")
"""All severities, the worst first.

`error`: Services do not work, or will not work once kproxy runs. `warning`: some traffic may fail. `info`: nothing is
wrong, but it is good to know, or something could not be checked. `ok`: the check passed.
"""


class Finding(ReportPart, frozen=True, kw_only=True):
    """The result of one check.

    `code` is stable, so that programs can rely on it. `message` is what was seen, and `action` is what to do, each on
    one line; a check that passed needs no action.
    """

    code: str
    severity: Severity
    message: str
    action: str = ""


def error(code: str, message: str, action: str) -> Finding:
    """Return a finding about something that breaks Services."""
    return Finding(code=code, severity="error", message=message, action=action)


def warning(code: str, message: str, action: str) -> Finding:
    """Return a finding about something that may break some traffic."""
    return Finding(code=code, severity="warning", message=message, action=action)


def info(code: str, message: str, action: str = "") -> Finding:
    """Return a finding about something that is good to know."""
    return Finding(code=code, severity="info", message=message, action=action)


def passed(code: str, message: str) -> Finding:
    """Return a finding about a check that passed."""
    return Finding(code=code, severity="ok", message=message)
