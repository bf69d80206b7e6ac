"""`kproxy apply`: program the node once."""

from __future__ import annotations

import argparse

from kproxy.cli.errors import FailureError
from kproxy.cli.options import OBJECTS_HELP, add_flags, load_settings

EPILOG = """\
examples:
  kproxy apply --objects=web.yaml
  kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml && kproxy apply --objects=all.yaml

Exits with 0 only when the kernel accepted everything. Rules of Services that are not in PATH are removed."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "apply",
        help="program the node once from files",
        usage="kproxy apply --objects PATH [FLAGS]",
        description="Program this node once, from files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", required=True, help=OBJECTS_HELP)
    add_flags(parser)
    parser.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from kproxy import once
    from kproxy.families import StartError
    from kproxy.kube.file_source import FileSourceError
    from kproxy.model.outcome import SyncError

    try:
        once.apply(config, options.objects)
    except (StartError, FileSourceError, SyncError) as error:
        raise FailureError(str(error)) from None
