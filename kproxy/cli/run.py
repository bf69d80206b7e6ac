"""`kproxy run`: the daemon."""

from __future__ import annotations

import argparse

from kproxy.cli.errors import FailureError
from kproxy.cli.options import OBJECTS_HELP, add_flags, load_settings

EPILOG = """\
examples:
  kproxy run --config=/var/lib/kube-proxy/config.conf --hostname-override=$NODE_NAME
  kproxy run --kubeconfig=$HOME/.kube/config --cluster-cidr=10.244.0.0/16
  kproxy run --objects=./cluster/ --hostname-override=node-1

Without --kubeconfig and --objects it uses the Pod's service account. SIGTERM ends it and leaves the rules in place."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "run",
        help="keep the node's rules after the cluster (or files), until told to stop",
        description="Keep this node's rules after the Services and EndpointSlices of a cluster or of files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", help=f"follow {OBJECTS_HELP}, instead of an API server")
    add_flags(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from kproxy import daemon

    try:
        daemon.run(config, options.objects)
    except daemon.StartError as error:
        raise FailureError(str(error)) from None
