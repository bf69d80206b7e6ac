"""`kproxy apply`: program the node once, from files."""

from __future__ import annotations

import argparse

from kproxy.cli.console import CannotTellError, CommandFailedError, UsageError
from kproxy.cli.options import DAEMON_GROUPS, OBJECTS_HELP, SYNTAX, load_settings, required_objects
from kproxy.cli.output import ExitCode, add_output_flag, show_report
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config
from kproxy.config.flags import add_flags

EPILOG = f"""\
examples:
  # program the current state of the cluster
  kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml
  kproxy apply --objects=all.yaml
  # use kube-proxy's configuration, and this Node name instead of the host name
  kproxy apply --objects=all.yaml --hostname-override=node-1 \\
      --config=config.conf
  # read a directory of files; nftables mode
  kproxy apply --objects=./cluster/ --proxy-mode=nftables
  # masquerade traffic to ClusterIPs from outside the pod network
  kproxy apply --objects=web.yaml --cluster-cidr=10.244.0.0/16,fd00:10::/56
  # what would change, and would the kernel accept it? Changes nothing
  kproxy apply --objects=all.yaml --dry-run

{SYNTAX}
Other flags of `kproxy run`, except its actions, are accepted and ignored.

`kproxy apply` also removes the rules of Services that are not in the files
given with --objects. The exit code is 0 only if the kernel accepted all rules.

With --dry-run, the kernel checks the rules, in iptables mode in a temporary
network namespace. exit codes: 0 all rules would be accepted, 1 the kernel
rejects Services, or the command failed, 2 invalid usage, 3 cannot tell."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "apply",
        help=COMMANDS["apply"],
        usage="kproxy apply --objects=PATH [--dry-run [-o FORMAT]] [FLAGS]",
        description="Program this node once, from files, and exit.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`: argparse would report a misspelled `--objects` as missing instead of as an unknown flag.
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would change, let the kernel check it, and change nothing"
    )
    add_output_flag(parser)
    add_flags(parser, once=True, hidden=DAEMON_GROUPS)
    parser.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> int:
    objects = required_objects(options)
    config = load_settings(options)
    if options.dry_run:
        return _dry_run(config, objects, options.output)
    if options.output != "text":
        raise UsageError("-o needs --dry-run")
    from kproxy.app import one_shot
    from kproxy.app.backends import StartError
    from kproxy.kube.manifests.file_source import FileSourceError
    from kproxy.model.sync_report import SyncError

    try:
        one_shot.apply(config, objects)
    except (StartError, FileSourceError, SyncError) as error:
        raise CommandFailedError(str(error)) from None
    return ExitCode.WORKS


def _dry_run(config: Config, objects: str, output: str) -> int:
    from kproxy.app.backends import StartError, check_privileges
    from kproxy.app.dry_run import try_rules
    from kproxy.cli.diff import family_differences, kernel_state
    from kproxy.cli.difference_text import dry_run_lines
    from kproxy.diagnose.difference import DryRun, FamilyTrial, RejectedService
    from kproxy.kube.manifests.file_source import FileSourceError
    from kproxy.model.sync_report import SyncError

    try:
        check_privileges()
        state = kernel_state(config, objects)
        differences = family_differences(state)
        trials = try_rules(config, state)
    except FileSourceError as error:
        raise CommandFailedError(str(error)) from None
    except (StartError, SyncError) as error:
        raise CannotTellError(str(error)) from None
    report = DryRun(
        mode=state.mode,
        node=state.node_name,
        source=state.source,
        services=state.services,
        accepted=not any(each.rejected or each.problem for each in trials.values()),
        identical=not any(each.differences for each in differences),
        trials=tuple(
            FamilyTrial(family=family.value, checked_by=each.by, problem=each.problem)
            for family, each in trials.items()
        ),
        rejected=tuple(
            RejectedService(family=family.value, service=key, reason=reason)
            for family, each in trials.items()
            for key, reason in each.rejected.items()
        ),
        families=differences,
    )
    show_report(report, output, lambda style: dry_run_lines(report, style))
    return ExitCode.WORKS if report.accepted else ExitCode.BROKEN
