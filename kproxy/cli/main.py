"""The `kproxy` command: which subcommand, and what its errors look like."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kproxy import __version__
from kproxy.cli import apply, render, run
from kproxy.cli.errors import FailureError, UsageError

DESCRIPTION = """\
Kubernetes' Linux service proxy: programs the node so that connections to Services reach their endpoints.
Takes kube-proxy's configuration file and flags as they are."""

EXAMPLES = """\
examples:
  kproxy run --config=/var/lib/kube-proxy/config.conf     in kube-proxy's place on a node
  kproxy run --objects=web.yaml                           the same without a cluster, from files
  kproxy apply --objects=web.yaml                         once
  kproxy render --objects=web.yaml --family=ipv4          show the rules; needs no root

`kproxy COMMAND --help` tells more."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, not a page of usage with the reason at its end."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read what is right."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str]) -> int:
    """Run one command. Return 0, 1 if it failed, or 2 if it was called wrongly; errors are one line on stderr."""
    parser = OneLineParser(
        "kproxy",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kproxy {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (run, apply, render):
        module.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except UsageError as error:
        return _complain(error, 2)
    except FailureError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough; leave nothing that the interpreter would flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=error)
        return _complain(f"unexpected {error!r}: please report this (with -v=4 it says where)", 1)
    return 0


def _complain(error: object, code: int) -> int:
    for line in str(error).splitlines():
        print(f"kproxy: {line}", file=sys.stderr)
    return code
