"""The reports of `kproxy diff` without `--against`, and of `kproxy apply --dry-run`. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.types import ServiceKey

DifferenceKind: TypeAlias = Literal["table", "chain", "set", "element", "rule"]
DifferenceChange: TypeAlias = Literal["missing", "extra", "changed"]


class RuleDifference(ReportPart, frozen=True, kw_only=True):
    """A part of the rules that is missing in the kernel, that is there but must not be, or that is different.

    `name` is the name of the chain, or of the nftables set or map. If a family has none of kproxy's rules, its only
    difference is the table. `services` are the Services to which the part belongs; it is empty if it belongs to none,
    or to all of them. `expected` are the rules or elements that kproxy would write, and `found` those that it would
    delete, one on each line. `remark` says what else is different, or "".
    """

    change: DifferenceChange
    kind: DifferenceKind
    table: str
    name: str
    services: tuple[ServiceKey, ...] = ()
    expected: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    remark: str = ""


def other_mode(remains: str) -> RuleDifference:
    """Describe what a family has of the other proxy mode."""
    remark = "belongs to the other proxy mode: kproxy deletes it after its first sync"
    return RuleDifference(change="extra", kind="table", table=remains, name=remains, remark=remark)


class FamilyDifference(ReportPart, frozen=True, kw_only=True):
    """The differences between the desired state and the kernel in one IP family.

    `findings` are rules of other programs that take traffic away from Services, and which kproxy does not change.
    """

    family: str
    differences: tuple[RuleDifference, ...] = ()
    findings: tuple[str, ...] = ()


class RulesDifference(Report, frozen=True, kw_only=True):
    """How the rules in the kernel of this node differ from those that the objects need.

    `source` tells where the objects come from. `notes` are reasons for which differences are to be expected, such as
    a change that the daemon has not programmed yet.
    """

    mode: str
    node: str
    source: str
    services: int
    identical: bool
    families: tuple[FamilyDifference, ...]
    notes: tuple[str, ...] = ()


class RejectedService(ReportPart, frozen=True, kw_only=True):
    """A Service whose rules the kernel rejects, and the kernel's reason on one line."""

    family: str
    service: ServiceKey
    reason: str


class FamilyTrial(ReportPart, frozen=True, kw_only=True):
    """What was checked in one IP family, and whether the result is that everything can be programmed.

    `checked_by` is `kernel` if the kernel has checked the rules. It is `iptables` if only iptables-restore has, which
    recognizes invalid rules, but not what the kernel does not support. `problem` is why nothing can be programmed in
    the family, or "".
    """

    family: str
    checked_by: Literal["kernel", "iptables"]
    problem: str = ""


class DryRun(Report, frozen=True, kw_only=True):
    """What `kproxy apply` would change on this node, and whether the kernel would accept it."""

    mode: str
    node: str
    source: str
    services: int
    accepted: bool
    identical: bool
    trials: tuple[FamilyTrial, ...]
    rejected: tuple[RejectedService, ...]
    families: tuple[FamilyDifference, ...]
