"""`kproxy apply`: program the node once."""

from __future__ import annotations

import argparse

from kproxy.cli.console import CommandFailedError
from kproxy.cli.options import OBJECTS_HELP, OF_THE_DAEMON, SYNTAX, load_settings, needed_objects
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config.flags import add_flags

EPILOG = f"""\
examples:
  # what the cluster has now
  kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml
  kproxy apply --objects=all.yaml
  # as the Node of that name, with the settings of its kube-proxy
  kproxy apply --objects=all.yaml --hostname-override=node-1 \\
      --config=config.conf
  # a folder of files, in mode nftables
  kproxy apply --objects=./cluster/ --proxy-mode=nftables
  # traffic from outside of the pods' addresses to cluster IPs gets SNAT
  kproxy apply --objects=web.yaml --cluster-cidr=10.244.0.0/16,fd00:10::/56

{SYNTAX}
Flags of `kproxy run` that mean nothing here are taken too, and not shown.

Exits with 0 only when the kernel accepted everything. Rules of Services that
are not in PATH are removed."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "apply",
        help=COMMANDS["apply"],
        usage="kproxy apply --objects=PATH [FLAGS]",
        description="Program this node once, from files.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`, or its lack would be told when it is misspelt.
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    add_flags(parser, once=True, hidden=OF_THE_DAEMON)
    parser.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> None:
    objects = needed_objects(options)
    config = load_settings(options)
    from kproxy.app import one_shot as once
    from kproxy.app.backends import StartError
    from kproxy.kube.manifests.file_source import FileSourceError
    from kproxy.model.sync_report import SyncError

    try:
        once.apply(config, objects)
    except (StartError, FileSourceError, SyncError) as error:
        raise CommandFailedError(str(error)) from None
