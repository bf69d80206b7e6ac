"""`kproxy diff`: compare the desired state with the kernel, with other objects, or with another configuration."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kproxy.cli.console import CannotTellError, CommandFailedError, UsageError
from kproxy.cli.options import DAEMON_GROUPS, OBJECTS_HELP, SYNTAX, load_settings
from kproxy.cli.output import ExitCode, add_output_flag, show_report
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config
from kproxy.config.flags import add_flags

if TYPE_CHECKING:
    from kproxy.app.desired_state import DesiredState
    from kproxy.diagnose.difference import FamilyDifference
    from kproxy.diagnose.difference_objects import FlowCounts, ServiceDifference, WrittenRules
    from kproxy.model.types import Family
    from kproxy.sync.planning import PlannedFamily

EPILOG = f"""\
examples:
  # is anything missing, extra or changed in the kernel?
  sudo kproxy diff
  # the same for a node without a daemon, with its flags
  sudo kproxy diff --objects=all.yaml --proxy-mode=nftables
  # the rules of another node, from the output of iptables-save there
  kproxy diff --objects=all.yaml --hostname-override=node-2 --dump=rules.v4
  # what would a changed Service or fewer endpoints do on this node?
  kproxy diff --objects=all.yaml --against=new.yaml
  # what would another configuration change?
  kproxy diff --config=config.conf --against-config=new.conf \\
      --objects=all.yaml

{SYNTAX}
Without --objects, the objects are those of the daemon on this node. Only root
may ask the daemon, read the kernel or count connections; --objects with
--against or --against-config needs no privileges. With --against-config, flags
apply to both configurations.

In the text, + marks what `kproxy apply` would write, and - what it would
delete. Nothing is changed.

exit codes: 0 no difference, 1 differences or failed, 2 invalid usage, 3 cannot
tell, for example without privileges or because no daemon answers."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "diff",
        help=COMMANDS["diff"],
        usage="kproxy diff [--objects=PATH] [--against=PATH] [FLAGS]",
        description="Show what differs between the desired state of this node and the kernel, or\n"
        "between two desired states.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", metavar="PATH", help="file or directory with the objects that would replace them")
    other.add_argument("--against-config", metavar="FILE", help="configuration file that would replace --config")
    other.add_argument(
        "--dump", metavar="FILE", help="output of iptables-save or ip6tables-save to compare instead of the kernel"
    )
    add_output_flag(parser)
    add_flags(parser, once=True, hidden=DAEMON_GROUPS)
    parser.set_defaults(command=_diff)


def _diff(options: argparse.Namespace) -> int:
    config = load_settings(options)
    from kproxy.app.backends import StartError
    from kproxy.kube.manifests.file_source import FileSourceError
    from kproxy.model.sync_report import SyncError

    try:
        if options.against:
            return _against(options, config)
        if options.against_config:
            return _against_config(options, config)
        if options.dump:
            return _dump(options, config)
        return _kernel(options, config)
    except FileSourceError as error:
        raise CommandFailedError(str(error)) from None
    except (StartError, SyncError) as error:
        raise CannotTellError(str(error)) from None


# The kernel


def _kernel(options: argparse.Namespace, config: Config) -> int:
    from kproxy.app.backends import check_privileges

    check_privileges()
    state = kernel_state(config, options.objects) if options.objects else _daemon_state()
    return _show_rules(options, state, family_differences(state))


def kernel_state(config: Config, objects: str) -> DesiredState:
    """Return the desired state that `kproxy apply` would program. Raises what `from_files` raises, and `StartError`."""
    from kproxy.app.desired_state import from_files, kernel_contexts
    from kproxy.app.kernel_difference import iptables_runners, kernel_families

    runners = iptables_runners() if config.effective_mode == "iptables" else {}
    contexts = kernel_contexts(config, runners)
    return from_files(
        config, objects, {family: make for family, make in contexts.items() if family in kernel_families()}
    )


def family_differences(state: DesiredState) -> tuple[FamilyDifference, ...]:
    """Compare a desired state with the kernel. Raises `SyncError` or `StartError` if it cannot be read."""
    from msgspec.structs import replace

    from kproxy.app.cleanup import remains_of_other_mode
    from kproxy.diagnose.difference import other_mode
    from kproxy.host.commands import CommandError
    from kproxy.model.sync_report import SyncError

    found = []
    for family, planned in state.families.items():
        difference = _family_difference(state, family, planned)
        try:
            remains = remains_of_other_mode(family, state.mode)
        except (CommandError, OSError) as error:
            raise SyncError(f"{family.value}: cannot look for the rules of the other proxy mode: {error}") from None
        if remains:
            difference = replace(difference, differences=(*difference.differences, other_mode(remains)))
        found.append(difference)
    return tuple(found)


def _family_difference(state: DesiredState, family: Family, planned: PlannedFamily) -> FamilyDifference:
    from kproxy.app.kernel_difference import compare_iptables, compare_nftables, iptables_runners, list_chains
    from kproxy.diagnose.difference_iptables import iptables_difference
    from kproxy.diagnose.difference_nftables import (
        missing_table,
        nftables_difference,
        rules_of_listing,
        unusable_table,
    )
    from kproxy.model.sync_report import SyncError

    if state.mode == "iptables":
        if (runner := iptables_runners().get(family)) is None:
            raise SyncError(f"{family.value}: iptables does not work on this node")
        damaged = compare_iptables(runner, planned, state.dispatch_threshold)
        return iptables_difference(damaged.desired, damaged.damage, damaged.found)
    compared = compare_nftables(planned)
    if compared.parts is not None and compared.repair is not None:
        chains = [part.name for part in sorted(compared.repair.parts) if part.kind == "chain"]
        listed = {name: rules_of_listing(text) for name, text in list_chains(family, chains).items()}
        return nftables_difference(compared.ledger, family, compared.parts, compared.repair, listed)
    if compared.reason:
        return unusable_table(family, compared.reason)
    return missing_table(compared.ledger, family)


def _dump(options: argparse.Namespace, config: Config) -> int:
    from kproxy.app.desired_state import assumed_contexts, from_files
    from kproxy.app.kernel_difference import SavedReader, compare_iptables
    from kproxy.diagnose.difference_iptables import iptables_difference
    from kproxy.iptables.save_restore import SaveError, parse_save
    from kproxy.model.types import Family

    if not options.objects:
        raise UsageError("--dump needs --objects=PATH")
    if config.effective_mode != "iptables":
        raise UsageError("--dump needs iptables mode: it reads the output of iptables-save")
    try:
        with open(options.dump, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines(keepends=True)
        saved = parse_save(lines)
    except OSError as error:
        raise UsageError(f"{options.dump}: cannot read: {error.strerror}") from None
    except SaveError as error:
        raise UsageError(f"{options.dump}: {error}") from None
    six = any(line.startswith("# Generated by ip6tables-save") for line in lines)
    family = Family.IPV6 if six else Family.IPV4
    state = from_files(config, options.objects, {family: assumed_contexts(config)[family]})
    threshold = config.kproxy.iptables_dispatch_threshold
    compared = compare_iptables(SavedReader(saved, lines), state.families[family], threshold)
    return _show_rules(options, state, (iptables_difference(compared.desired, compared.damage, compared.found),))


def _show_rules(options: argparse.Namespace, state: DesiredState, differences: tuple[FamilyDifference, ...]) -> int:
    from kproxy.cli.difference_text import rules_lines
    from kproxy.diagnose.difference import RulesDifference

    identical = not any(each.differences for each in differences)
    report = RulesDifference(
        mode=state.mode,
        node=state.node_name,
        source=state.source,
        services=state.services,
        identical=identical,
        families=differences,
        notes=state.notes,
    )
    show_report(report, options.output, lambda style: rules_lines(report, style))
    return ExitCode.WORKS if identical else ExitCode.BROKEN


def _daemon_state() -> DesiredState:
    from kproxy.app.desired_state import from_daemon
    from kproxy.cli.control_client import fetch_objects, fetch_service, fetch_waiting

    return from_daemon(fetch_objects(), fetch_waiting(), fetch_service("/"))


# Other objects


def _against(options: argparse.Namespace, config: Config) -> int:
    from kproxy.app.desired_state import assumed_contexts, changed, from_files
    from kproxy.app.one_shot import load_store
    from kproxy.cli.difference_text import objects_lines
    from kproxy.diagnose.difference_objects import ObjectsDifference, service_differences

    state = from_files(config, options.objects, assumed_contexts(config)) if options.objects else _daemon_state()
    after = changed(state, load_store(config, options.against, state.node_name))
    services: list[ServiceDifference] = []
    for family, planned in state.families.items():
        old, new = planned.plans, after[family].plans
        services += service_differences(family.value, old, new, _flows(family) if old != new else None)
    rules = tuple(written(state, after, state.mode, state.dispatch_threshold))
    report = ObjectsDifference(
        mode=state.mode,
        node=state.node_name,
        before=state.source if options.objects else "the objects of the daemon",
        after=options.against,
        identical=not services and not any(each.added or each.removed for each in rules),
        services=tuple(services),
        rules=rules,
        notes=tuple(problem for each in after.values() for problem in each.problems),
    )
    show_report(report, options.output, lambda style: objects_lines(report, style))
    return ExitCode.WORKS if report.identical else ExitCode.BROKEN


def _flows(family: Family) -> FlowCounts | None:
    """Count the connections of this node, or return None if this process may not."""
    from kproxy.host.ctnetlink import count_flows

    try:
        return count_flows(family)
    except OSError:
        return None


def written(
    before: DesiredState, after: Mapping[Family, PlannedFamily], mode: str, dispatch_threshold: int
) -> Iterator[WrittenRules]:
    """Count the rules and elements that the change of each family writes.

    `after`, `mode` and `dispatch_threshold` are those after the change.
    """
    from kproxy.diagnose.written_rules import Rendering, count_written

    old_rendering = Rendering(before.mode, before.dispatch_threshold)
    rendering = Rendering(mode, dispatch_threshold)
    for family, old in before.families.items():
        yield count_written(old, old_rendering, after[family], rendering)


# Another configuration


def _against_config(options: argparse.Namespace, config: Config) -> int:
    from kproxy.app.desired_state import assumed_contexts, from_files
    from kproxy.cli.difference_text import configuration_lines
    from kproxy.config.load import as_document
    from kproxy.diagnose.difference_configuration import (
        ConfigurationDifference,
        ContextDifference,
        context_effects,
        field_differences,
        mode_effects,
    )

    new = load_settings(argparse.Namespace(**{**vars(options), "config": options.against_config}))
    fields = field_differences(as_document(config), as_document(new), new.effective_mode)
    old_contexts, new_contexts = assumed_contexts(config), assumed_contexts(new)
    effects, rules = [], []
    if options.objects:
        before = from_files(config, options.objects, old_contexts)
        after = from_files(new, options.objects, new_contexts)
        rules = list(written(before, after.families, after.mode, after.dispatch_threshold))
        pairs = {family: (each.context, after.families[family].context) for family, each in before.families.items()}
    else:
        pairs = {family: (make(None), new_contexts[family](None)) for family, make in old_contexts.items()}
    for family, (first, second) in pairs.items():
        if found := (*mode_effects(config, new), *context_effects(first, second)):
            effects.append(ContextDifference(family=family.value, effects=found))
    report = ConfigurationDifference(
        before=options.config or "the defaults and flags",
        after=options.against_config,
        identical=not fields,
        fields=fields,
        effects=tuple(effects),
        rules=tuple(rules),
    )
    show_report(report, options.output, lambda style: configuration_lines(report, style))
    return ExitCode.WORKS if report.identical else ExitCode.BROKEN
