"""Whether the kernel has the rules of a Service: what the daemon says, and what differs in the kernel. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct

from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import Reason, Verdict
from kproxy.diagnose.service_problem import never_synced
from kproxy.model.service_state import FamilyServiceState, ServiceState
from kproxy.model.types import Family

MAX_NAMED = 5
"""Maximum number of differences that a reason names."""


class RulesProblem(Struct, frozen=True):
    """A problem with the rules of a Service. `first` means that it precedes the problems of single ports."""

    verdict: Verdict
    reason: Reason
    first: bool = False


def rules_problem(facts: Facts, families: Collection[Family]) -> RulesProblem | None:
    """Return why the kernel does not have the planned rules of a Service in `families`, or None if it has them."""
    if facts.daemon is not None:
        states = {family: state for family, state in facts.daemon.families.items() if family in families}
        if facts.daemon.families and not states:
            return _not_served(facts, families)
        problem = _quarantined(states) or _unsynced(facts, facts.daemon, states)
        if problem is not None:
            return problem
    return _drifted(facts)


def _not_served(facts: Facts, families: Collection[Family]) -> RulesProblem:
    name = " and ".join(family.value for family in families)
    reason = Reason(
        code="FamilyMissing",
        message=f"the Service has only {name} addresses, and kproxy on {facts.node_name} does not serve {name}",
        fix=f"see the log of kproxy at its start: it says why it skips {name}",
    )
    return RulesProblem("NOT PROGRAMMED", reason, first=True)


def _quarantined(states: Mapping[Family, FamilyServiceState]) -> RulesProblem | None:
    rejected = {family: state.quarantined for family, state in states.items() if state.quarantined}
    for family, why in rejected.items():
        reason = Reason(
            code="Quarantined",
            message=f"the kernel rejects the {family.value} rules of the Service: {why}",
            details=("kproxy programs all other Services and tries this one again later",),
            fix="see the log of kproxy; change what the message names, or report a bug with it",
        )
        return RulesProblem("NOT PROGRAMMED" if len(rejected) == len(states) else "DEGRADED", reason, first=True)
    return None


def _unsynced(facts: Facts, daemon: ServiceState, states: Mapping[Family, FamilyServiceState]) -> RulesProblem | None:
    failing = next(((family, state) for family, state in states.items() if state.failure), None)
    never = bool(states) and all(state.context is None for state in states.values())
    if (never or not daemon.complete) and failing is None:
        return RulesProblem("NOT PROGRAMMED", never_synced(facts), first=True)
    if failing is not None:
        family, state = failing
        since = f" for {state.failing_seconds:.0f} s" if state.failing_seconds else ""
        reason = Reason(
            code="NotSyncedYet",
            message=f"kproxy has failed to program {family.value}{since}: {state.failure}",
            details=("the rules in the kernel are those of the last successful sync",) if state.context else (),
            fix="remove the cause that the message names; kproxy tries again by itself",
        )
        return RulesProblem("NOT PROGRAMMED", reason)
    if any(state.pending for state in states.values()):
        reason = Reason(
            code="NotSyncedYet",
            message="the latest change of the Service is not programmed yet",
            details=("kproxy has received it and programs it at the next sync",),
            fix="repeat the command; if this stays, lower minSyncPeriod or see the log of kproxy",
        )
        return RulesProblem("NOT PROGRAMMED", reason)
    planned = facts.plans()
    if (
        facts.live
        and facts.objects is not None
        and any(planned.get(family, ()) != state.plans for family, state in states.items())
    ):
        reason = Reason(
            code="NotSyncedYet",
            message="the latest state of the Service or of its endpoints has not reached kproxy yet",
            fix="repeat the command; if this stays, check the connection of kproxy to the API server",
        )
        return RulesProblem("NOT PROGRAMMED", reason)
    return None


def _drifted(facts: Facts) -> RulesProblem | None:
    kernel = facts.kernel
    if kernel is None or not (kernel.differences or kernel.absent):
        return None
    if kernel.absent and set(kernel.absent) == set(kernel.compared):
        return RulesProblem("NOT PROGRAMMED", _all_absent(facts))
    named = [f"{each.object} {each.problem}" for each in kernel.differences]
    named += [f"all {family.value} rules are missing" for family in kernel.absent]
    rest = len(named) - MAX_NAMED
    reason = Reason(
        code="Drifted",
        message=f"the rules in the kernel are not as planned: {named[0]}",
        details=(*named[1:MAX_NAMED], *([f"and {rest} more"] if rest > 0 else [])),
        fix="find out which program changes the rules; kproxy restores them, at the latest after syncPeriod",
    )
    return RulesProblem("DEGRADED", reason)


def _all_absent(facts: Facts) -> Reason:
    if facts.daemon is None:
        return Reason(
            code="NotSyncedYet",
            message=f"the kernel of {facts.node_name} has no rules of kproxy in {facts.mode} mode",
            fix="start kproxy on this node, or check that it runs in this mode and network namespace",
        )
    return Reason(
        code="Drifted",
        message=f"another program deleted all rules of kproxy ({facts.mode} mode)",
        fix="find out which program deletes them; kproxy restores them by itself, see its log if it does not",
    )
