"""`kproxy render`: print the rules without changing anything."""

from __future__ import annotations

import argparse

from kproxy.cli.console import CommandFailedError, show
from kproxy.cli.options import DAEMON_GROUPS, OBJECTS_HELP, SYNTAX, load_settings, required_objects
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config
from kproxy.config.flags import add_flags
from kproxy.model.types import Family

EPILOG = f"""\
examples:
  # both IP families, each under a heading
  kproxy render --objects=web.yaml | less
  # one IP family, without a heading
  kproxy render --objects=web.yaml --family=ipv4 > rules.v4
  # nftables mode; nft accepts the output as is
  kproxy render --objects=web.yaml --proxy-mode=nftables | sudo nft -f -
  # the rules of another node, with its kube-proxy configuration file
  kproxy render --objects=all.yaml --hostname-override=node-2 \\
      --config=config.conf
  # show what one setting changes
  kproxy render --objects=web.yaml --family=ipv4 > before
  kproxy render --objects=web.yaml --family=ipv4 --masquerade-all \\
      | diff before -

{SYNTAX}
Other flags of `kproxy run`, except its actions, are accepted and ignored.

Needs no root privileges and does not access the kernel, so it cannot check
what the node supports: an empty mode ("") always means nftables. In iptables
mode, the output assumes a node that supports --random-fully and has the nfacct
objects that two rules use. Without them, iptables-restore rejects the rules.
To program a node, use `kproxy apply`, which adapts to the kernel."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "render",
        help=COMMANDS["render"],
        usage="kproxy render --objects=PATH [--family=ipv4|ipv6] [FLAGS]",
        description="Print the rules for the objects in files, as input for iptables-restore or nft.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`: argparse would report a misspelled `--objects` as missing instead of as an unknown flag.
    parser.add_argument("--objects", metavar="PATH", help=OBJECTS_HELP)
    parser.add_argument(
        "--family",
        choices=["ipv4", "ipv6"],
        help="print only this IP family (default: both, each under a heading)",
    )
    add_flags(parser, once=True, hidden=DAEMON_GROUPS)
    parser.set_defaults(command=_render)


def _render(options: argparse.Namespace) -> None:
    objects = required_objects(options)
    config = load_settings(options)
    from kproxy.app import one_shot
    from kproxy.kube.manifests.file_source import FileSourceError

    try:
        texts = one_shot.render(config, objects)
    except FileSourceError as error:
        raise CommandFailedError(str(error)) from None
    if options.family:
        show(texts[Family.IPV6 if options.family == "ipv6" else Family.IPV4])
        return
    for family, text in texts.items():
        show(f"# {family.value}: input for {_program(config, family)}\n{text}")


def _program(config: Config, family: Family) -> str:
    if config.effective_mode != "iptables":
        return "nft -f -"
    return "ip6tables-restore --noflush" if family is Family.IPV6 else "iptables-restore --noflush"
