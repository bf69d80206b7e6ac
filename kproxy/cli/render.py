"""`kproxy render`: show the rules without touching anything."""

from __future__ import annotations

import argparse

from kproxy.cli.console import CommandFailedError, show
from kproxy.cli.options import OBJECTS_HELP, OF_THE_DAEMON, SYNTAX, load_settings, needed_objects
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config
from kproxy.config.flags import add_flags
from kproxy.model.types import Family

EPILOG = f"""\
examples:
  # both IP families, each after a line that names it
  kproxy render --objects=web.yaml | less
  # one family: input for a program
  kproxy render --objects=web.yaml --family=ipv4 \\
      | sudo iptables-restore --noflush
  kproxy render --objects=web.yaml --proxy-mode=nftables | sudo nft -f -
  # the rules of another node, with the settings of its kube-proxy
  kproxy render --objects=all.yaml --hostname-override=node-2 \\
      --config=config.conf
  # what one setting changes
  kproxy render --objects=web.yaml --family=ipv4 > before
  kproxy render --objects=web.yaml --family=ipv4 --masquerade-all \\
      | diff before -

{SYNTAX}
Flags of `kproxy run` that mean nothing here are taken too, and not shown.

Needs no root and no kernel. The rules are those of a node where everything
works: iptables with --random-fully, and the nfacct counters that two rules
name."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "render",
        help=COMMANDS["render"],
        usage="kproxy render --objects=PATH [--family=ipv4|ipv6] [FLAGS]",
        description="Print what programs an empty node from files: input for iptables-restore or nft.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`, or its lack would be told when it is misspelt.
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    parser.add_argument(
        "--family",
        choices=["ipv4", "ipv6"],
        help="print one family only; both otherwise, each after a line that names it",
    )
    add_flags(parser, once=True, hidden=OF_THE_DAEMON)
    parser.set_defaults(command=_render)


def _render(options: argparse.Namespace) -> None:
    objects = needed_objects(options)
    config = load_settings(options)
    from kproxy.app import one_shot as once
    from kproxy.kube.manifests.file_source import FileSourceError

    try:
        texts = once.render(config, objects)
    except FileSourceError as error:
        raise CommandFailedError(str(error)) from None
    if options.family:
        show(texts[Family.IPV6 if options.family == "ipv6" else Family.IPV4])
        return
    for family, text in texts.items():
        show(f"# {family.value}: input for {_program(config, family)}\n{text}")


def _program(config: Config, family: Family) -> str:
    if config.mode != "iptables":
        return "nft -f -"
    return "ip6tables-restore --noflush" if family is Family.IPV6 else "iptables-restore --noflush"
