"""`kproxy log-level`: show or change the log verbosity of the daemon on this node."""

from __future__ import annotations

import argparse

from kproxy.cli.console import UsageError, show
from kproxy.cli.control_client import change_verbosity, fetch_status
from kproxy.cli.parser import COMMANDS, HelpFormatter

EPILOG = """\
examples:
  # everything, also the commands that kproxy runs
  kubectl -n kube-system exec kproxy-x7k2p -- kproxy log-level 4
  # show the current verbosity
  kubectl -n kube-system exec kproxy-x7k2p -- kproxy log-level
  # back to normal
  kubectl -n kube-system exec kproxy-x7k2p -- kproxy log-level 0

The change lasts until the daemon is restarted. Files that --vmodule names keep
their verbosity if it is higher. Only root may ask the daemon."""
MAX_VERBOSITY = 10


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "log-level",
        help=COMMANDS["log-level"],
        usage="kproxy log-level [VERBOSITY]",
        description="Show or change the log verbosity (--v) of the daemon on this node.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verbosity", metavar="VERBOSITY", nargs="?", help="from 0 to 10; 2 and 4 add messages")
    parser.set_defaults(command=_log_level)


def _log_level(options: argparse.Namespace) -> None:
    if options.verbosity is None:
        show(f"{fetch_status().verbosity}\n")
        return
    if not options.verbosity.isdecimal() or int(options.verbosity) > MAX_VERBOSITY:
        raise UsageError(f"VERBOSITY must be an integer from 0 to {MAX_VERBOSITY}, not {options.verbosity!r}")
    change_verbosity(int(options.verbosity))
