"""`kproxy apply`: program the node once, from files."""

from __future__ import annotations

import argparse

from kproxy.cli.console import CommandFailedError
from kproxy.cli.options import DAEMON_GROUPS, OBJECTS_HELP, SYNTAX, load_settings, required_objects
from kproxy.cli.parser import COMMANDS, HelpFormatter
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

{SYNTAX}
Other flags of `kproxy run`, except its actions, are accepted and ignored.

`kproxy apply` also removes the rules of Services that are not in the files
given with --objects. The exit code is 0 only if the kernel accepted all rules."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "apply",
        help=COMMANDS["apply"],
        usage="kproxy apply --objects=PATH [FLAGS]",
        description="Program this node once, from files, and exit.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`: argparse would report a misspelled `--objects` as missing instead of as an unknown flag.
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    add_flags(parser, once=True, hidden=DAEMON_GROUPS)
    parser.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> None:
    objects = required_objects(options)
    config = load_settings(options)
    from kproxy.app import one_shot
    from kproxy.app.backends import StartError
    from kproxy.kube.manifests.file_source import FileSourceError
    from kproxy.model.sync_report import SyncError

    try:
        one_shot.apply(config, objects)
    except (StartError, FileSourceError, SyncError) as error:
        raise CommandFailedError(str(error)) from None
