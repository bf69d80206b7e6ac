"""The text that `kproxy explain` prints for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import Any

import msgspec

from kproxy.cli.output import WIDTH, Style, table, width
from kproxy.diagnose.explain_report import (
    EndpointExplanation,
    FrontendExplanation,
    PortExplanation,
    Reason,
    ServiceExplanation,
    Verdict,
)
from kproxy.model.printable_text import printable

MAX_ENDPOINTS = 20
"""Maximum number of endpoints of one port that the text shows. JSON and YAML have all of them."""
MAX_FLOWS = 10
"""Maximum number of groups of flows, and of differences in the rules, that the text shows."""
MAX_NAME = 40
"""Maximum number of characters of a Node's name."""
_SHORTEST = 30
"""Minimum number of characters of a column that is wrapped."""
_BELOW = 8
"""Indentation of a text that is put below a head which leaves too little room beside it."""


def explanation_lines(report: ServiceExplanation, style: Style) -> Iterator[str]:
    """Yield the lines of a report, each with at most `WIDTH` visible characters, whatever the objects contain."""
    report = msgspec.convert(_printable(msgspec.to_builtins(report)), ServiceExplanation)
    if len(report.ports) != 1:
        where = f"{report.service}  on {report.node}"
        yield _with_verdict(where, report.verdict, style)
        if report.reason is not None:
            yield from _reason_lines(report.reason, style)
    shown = report.reason if len(report.ports) != 1 else None
    for port in report.ports:
        yield from _port_lines(report, port, shown, style)
    for text in report.policies:
        yield from _wrapped("  policy  ", text)
    yield from _kernel_lines(report, style)
    yield from _flow_lines(report)
    if report.client is not None:
        yield from _client_lines(report)
    for note in report.notes:
        yield from _wrapped(f"  {style.warning('note')}    ", f"{note.code}: {note.message}")
    if report.symptom:
        yield report.symptom
    if report.reason is not None and report.reason.fix:
        yield from _wrapped(style.bold("Fix: "), report.reason.fix)
    if report.unseen:
        yield from _wrapped(style.dim("Not seen: "), "; ".join(report.unseen))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {name: _printable(each) for name, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list | tuple) else value


def _with_verdict(left: str, verdict: Verdict, style: Style) -> str:
    left = _cut(left, WIDTH - len(verdict) - 2)
    paint = style.good if verdict == "WORKS" else style.warning if verdict == "DEGRADED" else style.bad
    return left + " " * (WIDTH - width(left) - len(verdict)) + paint(verdict)


def _port_lines(report: ServiceExplanation, port: PortExplanation, shown: Reason | None, style: Style) -> Iterator[str]:
    name = f"{report.service}:{port.name}" if port.name else report.service
    own = [each for each in port.frontends if each.kind == "ClusterIP"]
    addresses = ", ".join(each.address for each in own) or str(port.port)
    yield _with_verdict(f"{name}  ClusterIP {addresses}/{port.protocol}", port.verdict, style)
    if port.reason is not None and port.reason != shown:
        yield from _reason_lines(port.reason, style)
        if port.reason != report.reason and port.reason.fix:
            yield from _wrapped("    fix: ", port.reason.fix)
    yield from _frontend_lines(port.frontends, style)
    yield from _endpoint_lines(port.endpoints, style)


def _reason_lines(reason: Reason, style: Style) -> Iterator[str]:
    head = f"  {style.bad('x')} {style.bold(reason.code)}  "
    yield from _wrapped(head, reason.message)
    for detail in reason.details:
        yield from _wrapped(" " * width(head), detail)


def _frontend_lines(frontends: Sequence[FrontendExplanation], style: Style) -> Iterator[str]:
    rows = []
    for each in frontends:
        outcome = each.outcome
        if outcome == "forwarded":
            outcome_text = style.good(f"to {each.endpoints} endpoint{'' if each.endpoints == 1 else 's'}")
        else:
            outcome_text = style.bad(outcome)
        rows.append((each.kind, f"{each.address}/{each.protocol}", outcome_text, each.remark))
    yield from _table(rows)


def _endpoint_lines(endpoints: Sequence[EndpointExplanation], style: Style) -> Iterator[str]:
    rows = []
    for each in endpoints[:MAX_ENDPOINTS]:
        mark = style.good("+") if each.used else style.dim("-")
        rows.append((f"  {mark} {each.address}", _cut(each.node, MAX_NAME) or "(no node)", each.message))
    yield from _table(rows)
    if len(endpoints) > MAX_ENDPOINTS:
        used = sum(each.used for each in endpoints[MAX_ENDPOINTS:])
        yield f"    and {len(endpoints) - MAX_ENDPOINTS} more endpoints, {used} of them used (-o json has all)"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield an indented table. The last column is wrapped."""
    for head, row in zip(table([[*row[:-1], "|"] for row in rows], indent="  "), rows, strict=True):
        start = head[: head.rindex("|")]
        yield from _wrapped(start, row[-1]) if row[-1] else [start.rstrip()]


def _kernel_lines(report: ServiceExplanation, style: Style) -> Iterator[str]:
    kernel = report.kernel
    if kernel.matches is None:
        return
    mark = style.good("ok") if kernel.matches else style.bad("x ")
    text = "rules match the plan" if kernel.matches else "rules differ from the plan"
    yield from _wrapped(
        f"  {mark} {_cut(report.node, MAX_NAME)}  ", f"{text} ({kernel.summary})" if kernel.summary else text
    )
    known = report.reason is not None and report.reason.code == "Drifted"
    for each in () if known else kernel.differences[:MAX_FLOWS]:
        yield from _wrapped("       ", f"{each.family}: {each.object} {each.problem}")


def _flow_lines(report: ServiceExplanation) -> Iterator[str]:
    rows = []
    for each in report.flows[:MAX_FLOWS]:
        text = f"{each.count} flow{'' if each.count == 1 else 's'} to {each.endpoint}"
        state = ", stale: it is no endpoint" if each.stale else ""
        rows.append(("conntrack", f"{each.frontend}/{each.protocol}", text + state))
    yield from _table(rows)
    if len(report.flows) > MAX_FLOWS:
        yield f"  and {len(report.flows) - MAX_FLOWS} more groups of flows (-o json has all)"


def _client_lines(report: ServiceExplanation) -> Iterator[str]:
    client = report.client
    assert client is not None
    yield from _wrapped("  client  ", f"{client.address} is {client.location}")
    if client.remark:
        yield from _wrapped("          ", client.remark)


def _wrapped(head: str, text: str) -> Iterator[str]:
    """Yield a text after a head, continued below itself."""
    indent = width(head)
    if WIDTH - indent < _SHORTEST and width(text) > WIDTH - indent:
        yield head.rstrip()  # too long for a column: the text goes below
        head, indent = " " * _BELOW, _BELOW
    room = WIDTH - indent
    for number, line in enumerate(_lines(text, room)):
        yield ((head if number == 0 else " " * indent) + line).rstrip()


def _lines(text: str, room: int) -> Iterable[str]:
    if width(text) <= room:
        return [text]
    return wrap(text, room, break_on_hyphens=False) or [""]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3] + "..."
