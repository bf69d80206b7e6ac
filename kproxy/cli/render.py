"""`kproxy render`: show the rules without touching anything."""

from __future__ import annotations

import argparse
import sys

from kproxy.cli.errors import FailureError
from kproxy.cli.options import OBJECTS_HELP, add_flags, load_settings
from kproxy.config import Config
from kproxy.model.types import Family

EPILOG = """\
examples:
  kproxy render --objects=web.yaml
  kproxy render --objects=web.yaml --family=ipv6 | less
  kproxy render --objects=web.yaml --family=ipv4 | sudo iptables-restore --noflush
  kproxy render --objects=web.yaml --proxy-mode=nftables | sudo nft -f -

Needs no root and no kernel. The rules are those of a node where everything works: iptables with --random-fully, and
the nfacct counters that two rules name."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "render",
        help="print the rules for files, changing nothing",
        usage="kproxy render --objects PATH [--family ipv4|ipv6] [FLAGS]",
        description="Print what programs an empty node from files: input for iptables-restore or nft.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", required=True, help=OBJECTS_HELP)
    parser.add_argument(
        "--family",
        choices=["ipv4", "ipv6"],
        help="print one family only; both otherwise, each after a line that names it",
    )
    add_flags(parser)
    parser.set_defaults(command=_render)


def _render(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from kproxy import once
    from kproxy.kube.file_source import FileSourceError

    try:
        texts = once.render(config, options.objects)
    except FileSourceError as error:
        raise FailureError(str(error)) from None
    if options.family:
        _print(texts[Family.IPV6 if options.family == "ipv6" else Family.IPV4])
        return
    for family, text in texts.items():
        _print(f"# {family.value}: input for {_program(config, family)}\n{text}")


def _program(config: Config, family: Family) -> str:
    if config.mode != "iptables":
        return "nft -f -"
    return "ip6tables-restore --noflush" if family is Family.IPV6 else "iptables-restore --noflush"


def _print(text: str) -> None:
    if sys.stdout is None:
        raise FailureError("cannot print: standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # or the interpreter would try once more at its end
        raise FailureError(f"cannot print: {error.strerror}") from None
