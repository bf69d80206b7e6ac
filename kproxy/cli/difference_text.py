"""The text of the reports about differences, for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kproxy.cli.output import Style, table
from kproxy.diagnose.difference import DryRun, FamilyDifference, RuleDifference, RulesDifference
from kproxy.diagnose.difference_configuration import ConfigurationDifference
from kproxy.diagnose.difference_objects import (
    ObjectsDifference,
    ServiceDifference,
    WrittenRules,
    frontend_text,
)

SHOWN = 50
"""The maximum number of differences, Services or endpoints of each list that the text shows."""
SHOWN_RULES = 6
"""The maximum number of rules or elements that the text shows of each difference."""


def rules_lines(report: RulesDifference, style: Style) -> Iterator[str]:
    """Yield the lines of `kproxy diff`."""
    total = sum(len(each.differences) for each in report.families)
    result = style.good("no difference") if report.identical else style.bad(counted(total, "difference"))
    count = counted(report.services, "Service")
    yield f"{style.bold(f'node {report.node}')}, {report.mode} mode, {count} from {report.source}: {result}"
    yield from (f"  {style.warning('!')} {note}" for note in report.notes[:SHOWN])
    yield from _families(report.families, style)


def dry_run_lines(report: DryRun, style: Style) -> Iterator[str]:
    """Yield the lines of `kproxy apply --dry-run`."""
    verdict = style.good("would be accepted") if report.accepted else style.bad("would be rejected in part")
    count = counted(report.services, "Service")
    yield f"{style.bold(f'node {report.node}')}, {report.mode} mode, {count} from {report.source}: {verdict}"
    for trial in report.trials:
        if trial.problem:
            yield f"  {style.bad('x')} {trial.family}: {trial.problem}"
        elif trial.checked_by == "iptables":
            text = "only iptables-restore has checked the rules, not the kernel: that needs CAP_SYS_ADMIN"
            yield f"  {style.warning('!')} {trial.family}: {text}"
    for each in report.rejected[:SHOWN]:
        yield f"  {style.bad('x')} {each.family}: {each.service}: {each.reason}"
    yield from _more(len(report.rejected))
    if report.identical:
        yield "  nothing would change"
    yield from _families(report.families, style)


def _families(families: Iterable[FamilyDifference], style: Style) -> Iterator[str]:
    for family in families:
        if not family.differences and not family.findings:
            continue
        yield ""
        numbers = Counter(each.change for each in family.differences)
        counts = ", ".join(f"{number:,} {change}" for change, number in sorted(numbers.items(), reverse=True))
        yield f"{style.bold(family.family)}: {counts or 'no difference'}"
        yield from (f"  {style.warning('!')} {finding}" for finding in family.findings)
        for each in family.differences[:SHOWN]:
            yield from _difference(each, style)
        yield from _more(len(family.differences))


def _difference(each: RuleDifference, style: Style) -> Iterator[str]:
    services = f" of {', '.join(each.services[:5])}" if each.services else ""
    more = f" and {len(each.services) - 5} more" if len(each.services) > 5 else ""
    where = {
        "table": each.name if each.change == "extra" else f"table {each.name}",
        "chain": f"chain {each.name}",
        "set": f"set {each.name}",
        "element": f"element in {each.name}",
        "rule": f"rule in chain {each.name}" if len(each.expected + each.found) < 2 else f"rules in chain {each.name}",
    }[each.kind]
    table_text = f" (table {each.table})" if each.table not in {"kube-proxy", each.name} else ""
    remark = f": {each.remark}" if each.remark else ""
    yield f"  {style.warning(each.change)} {where}{table_text}{services}{more}{remark}"
    yield from (f"    {style.good('+')} {text}" for text in each.expected[:SHOWN_RULES])
    yield from _more(len(each.expected), SHOWN_RULES, "    ")
    yield from (f"    {style.bad('-')} {text}" for text in each.found[:SHOWN_RULES])
    yield from _more(len(each.found), SHOWN_RULES, "    ")


def objects_lines(report: ObjectsDifference, style: Style) -> Iterator[str]:
    """Yield the lines of `kproxy diff --against`."""
    changed = len({each.service for each in report.services})
    result = style.good("no difference") if report.identical else f"{counted(changed, 'Service')} would change"
    node = style.bold(f"node {report.node}")
    yield f"{node}, {report.mode} mode, {report.after} instead of {report.before}: {result}"
    yield from (f"  {style.warning('!')} {note}" for note in report.notes[:SHOWN])
    for each in report.services[:SHOWN]:
        yield from _service(each, style)
    yield from _more(len(report.services))
    yield from _written(report.rules, report.mode, style)


def _service(each: ServiceDifference, style: Style) -> Iterator[str]:
    yield ""
    paint = {"added": style.good, "removed": style.bad, "changed": style.warning}[each.change]
    yield f"{style.bold(each.service)} ({each.family}) {paint(each.change)}"
    for frontend in each.frontends[:SHOWN]:
        sign = {"added": style.good("+"), "removed": style.bad("-"), "changed": style.warning("~")}[frontend.change]
        effects = f": {'; '.join(frontend.effects)}" if frontend.effects else ""
        yield f"  {sign} {frontend_text(frontend)}{effects}"
    yield from _more(len(each.frontends))
    for endpoint in each.endpoints_added[:SHOWN]:
        yield f"  {style.good('+')} endpoint {endpoint}"
    yield from _more(len(each.endpoints_added))
    for lost in each.endpoints_removed[:SHOWN]:
        known = lost.connections is not None
        count = f", with {counted(lost.connections or 0, 'connection')} through this node" if known else ""
        yield f"  {style.bad('-')} endpoint {lost.endpoint}/{lost.protocol}{count}"
    yield from _more(len(each.endpoints_removed))
    if each.endpoints_added or each.endpoints_removed:
        yield f"    then {counted(each.endpoints, 'endpoint')}"


def configuration_lines(report: ConfigurationDifference, style: Style) -> Iterator[str]:
    """Yield the lines of `kproxy diff --against-config`."""
    result = style.good("no difference") if report.identical else counted(len(report.fields), "field")
    yield f"{report.after} instead of {report.before}: {result}"
    for field in report.fields:
        name = style.warning(field.field) if field.changes_rules else field.field
        yield f"  {name}: {json.dumps(field.after)} instead of {json.dumps(field.before)}: {field.meaning}"
    for each in report.effects:
        yield ""
        yield style.bold(each.family)
        yield from (f"  {effect}" for effect in each.effects)
    yield from _written(report.rules, "", style)


def _written(rules: Sequence[WrittenRules], mode: str, style: Style) -> Iterator[str]:
    if not any(each.written for each in rules):
        return
    yield ""
    yield style.bold("rules" if mode == "iptables" else "rules and elements")
    yield from table(
        [(each.family, f"{each.added:,} added, {each.removed:,} removed, {each.written:,} written") for each in rules],
        indent="  ",
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 Service`, `2 Services`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _more(number: int, shown: int = SHOWN, indent: str = "  ") -> Iterator[str]:
    if number > shown:
        yield f"{indent}and {number - shown:,} more; see -o json"
