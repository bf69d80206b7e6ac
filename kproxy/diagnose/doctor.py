"""Judge the facts about a node: `kproxy doctor`. Pure."""

from __future__ import annotations

from collections import Counter

from kproxy.config.types import Mode
from kproxy.diagnose.check_cluster import check_cluster
from kproxy.diagnose.check_network import check_network
from kproxy.diagnose.check_platform import check_platform
from kproxy.diagnose.check_rules import check_rules
from kproxy.diagnose.facts import HostFacts
from kproxy.diagnose.finding import SEVERITIES, Finding
from kproxy.diagnose.report import Report


class DoctorReport(Report, frozen=True, kw_only=True):
    """The state of a node. `complete` is false if some checks need privileges that this process does not have."""

    node_name: str
    mode: Mode
    kernel: str
    complete: bool
    errors: int
    warnings: int
    findings: tuple[Finding, ...]


def findings(facts: HostFacts) -> tuple[Finding, ...]:
    """Return the result of every check, the worst first."""
    found = [*check_platform(facts), *check_rules(facts), *check_network(facts), *check_cluster(facts)]
    return tuple(sorted(found, key=lambda each: SEVERITIES.index(each.severity)))


def doctor_report(facts: HostFacts) -> DoctorReport:
    """Return the report about a node."""
    found = findings(facts)
    counts = Counter(each.severity for each in found)
    return DoctorReport(
        node_name=facts.settings.node_name,
        mode=facts.settings.mode,
        kernel=facts.kernel,
        complete=facts.net_admin,
        errors=counts["error"],
        warnings=counts["warning"],
        findings=found,
    )
