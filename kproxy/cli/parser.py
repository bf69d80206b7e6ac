"""The parser of the command line: which commands there are, how their help looks, and what wrong usage is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from textwrap import wrap
from typing import TYPE_CHECKING, NoReturn

from kproxy import __version__
from kproxy.cli.console import show

if TYPE_CHECKING:
    from _typeshed import SupportsWrite
COMMANDS = {
    "run": "keep the node's rules after the cluster (or files), until told to stop",
    "apply": "program the node once from files",
    "render": "print the rules for files, changing nothing",
    "completion": "print a script that lets a shell complete kproxy's flags",
}
"""What each command is for; it is described in full by the module of its name beside this one."""
DESCRIPTION = """\
Kubernetes' Linux service proxy: programs the node so that connections to
Services reach their endpoints. Takes kube-proxy's configuration file and flags
as they are."""
EPILOG = """\
examples:
  # in kube-proxy's place on a node, with its file
  kproxy run --config=/var/lib/kube-proxy/config.conf
  # the same without a cluster, from files, which are followed
  kproxy run --objects=./cluster/
  # program the node once
  kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml
  kproxy apply --objects=all.yaml
  # show the rules; needs no root
  kproxy render --objects=all.yaml --family=ipv4
  # take all rules out again
  kproxy run --cleanup

`kproxy COMMAND --help` tells more."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that spells flags as they are written: `--flag=VALUE`, or `--flag[=BOOL]` where no value is needed."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._metavar_formatter(action, action.dest.upper())(1)[0]
        return ", ".join(action.option_strings) + (f"[={value}]" if action.nargs == "?" else f"={value}")

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, not a page of usage with the reason at its end."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read what is right. Exits with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is sys.stdout:
            show(message)
        else:
            super()._print_message(message, file)

    def refuse(self, word: str) -> NoReturn:
        """Say that a word of the command line is not known, and which flag was probably meant. Exits with 2."""
        if not word.strip("-") or not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        flag = word.partition("=")[0]
        self.error(f"unknown flag {flag}{_did_you_mean(flag, self.flags())}")

    def shown(self) -> list[argparse.Action]:
        """Return what the help names."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def flags(self) -> list[str]:
        """Return the flags as the help spells them."""
        return [option for action in self.shown() for option in action.option_strings]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of one command, and as `command` the function that runs it. Exits with 2 if it cannot."""
    first = arguments[0] if arguments else ""
    parser, commands = command_line({first})
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if first not in commands:
        _without_command(parser, first)
    options, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        commands[first].refuse(word)
    return options


def command_line(described: Collection[str]) -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """Return the parser, and those of all commands by name, of which only the `described` know their flags.

    What describes a command imports more than there is time for at every start.
    """
    parser = OneLineParser(
        "kproxy",
        usage="kproxy COMMAND [FLAGS]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kproxy {__version__}", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND [FLAGS]", prog="kproxy", required=True)
    for name, summary in COMMANDS.items():
        if name in described:
            import_module(f"kproxy.cli.{name}").add_command(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser, commands.choices


def _without_command(parser: OneLineParser, first: str) -> None:
    """Complain about a first word that is no command, unless the parser itself knows it."""
    if not first.startswith("-"):
        names = ", ".join(COMMANDS)
        parser.error(f"unknown command {first!r}{_did_you_mean(first, COMMANDS) or f'; there are {names}'}")
    flag = first.partition("=")[0]
    if flag in parser.flags():
        return
    if flag in command_line({"run"})[1]["run"].flags():
        parser.error(f"a command comes before {flag}, as in `kproxy run {first}`")
    parser.refuse(first)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
