"""The command-line parser: the list of commands, the layout of their help, and one-line usage errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from textwrap import wrap
from typing import TYPE_CHECKING, NoReturn

from kproxy import __version__
from kproxy.cli.console import show
from kproxy.model.printable_text import MAX_LENGTH, printable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite
COMMANDS = {
    "run": "keep the node's rules in sync with the cluster, or with files",
    "apply": "program the node once, from files",
    "render": "print the rules for the objects in files, without changing anything",
    "status": "show the state of the daemon on this node",
    "explain": "say why a Service works on this node or does not, and what to do",
    "trace": "follow a packet through every table of a node, to its verdict",
    "diff": "compare the desired state with the kernel, other objects or another configuration",
    "doctor": "check whether kproxy can work on this node, and what may disturb it",
    "top": "show the connections to Services and their endpoints",
    "bundle": "collect everything for a bug report in one archive",
    "log-level": "show or change the log verbosity of the daemon on this node",
    "completion": "print a shell completion script",
}
"""The commands and their summaries. Each command is defined by the module of the same name in this package."""
DESCRIPTION = """\
Service proxy for Kubernetes on Linux: programs iptables or nftables rules so
that connections to Services reach their endpoints. Accepts kube-proxy's
configuration file and flags, but does not support ipvs mode."""
EPILOG = """\
examples:
  # replace kube-proxy in its Pod, which mounts kubeadm's configuration file
  kproxy run --config=/var/lib/kube-proxy/config.conf
  # run without a cluster: watch files in a directory
  kproxy run --objects=./cluster/
  # program the node once
  kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml
  kproxy apply --objects=all.yaml
  # print the rules, without root privileges
  kproxy render --objects=all.yaml --family=ipv4
  # say why a Service does not work on this node
  kproxy explain shop/api
  # stop proxying: remove the rules of kproxy and kube-proxy
  kproxy run --cleanup

Run `kproxy COMMAND --help` for the flags of a command."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formats flags as users type them: `--flag=VALUE`, or `--flag[=BOOL]` if the value is optional."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._metavar_formatter(action, action.dest.upper())(1)[0]
        return ", ".join(action.option_strings) + (f"[={value}]" if action.nargs == "?" else f"={value}")

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error with a reference to the help, and exit with code 2."""
        self.exit(2, f"{self.prog}: {printable(message, MAX_LENGTH)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is sys.stdout:
            show(message)
        else:
            super()._print_message(message, file)

    def reject(self, word: str) -> NoReturn:
        """Print an error for an unknown argument or flag, with a similar flag if there is one, and exit with code 2."""
        if not word.strip("-") or not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        flag = word.partition("=")[0]
        self.error(f"unknown flag {flag}{_did_you_mean(flag, self.flags())}")

    def shown(self) -> list[argparse.Action]:
        """Return the argparse actions that are listed in the help."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def flags(self) -> list[str]:
        """Return the flags that are listed in the help, with their dashes."""
        return [option for action in self.shown() for option in action.option_strings]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. The attribute `command` of the result is the function to run.

    Raises `SystemExit`: with code 0 after `--help` and `--version`, and with code 2 for invalid usage.
    """
    first = arguments[0] if arguments else ""
    parser, commands = command_line({first}, {first} if first in COMMANDS else COMMANDS)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if first not in commands:
        _reject_first(parser, first)
    options, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        commands[first].reject(word)
    return options


def command_line(
    described: Collection[str], accepted: Collection[str] = COMMANDS.keys()
) -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """Return the top-level parser, and the parsers of the commands in `accepted` by name.

    Every parser takes a millisecond. Only the parsers of the commands in `described` have flags. Defining a command's
    flags imports its module and the configuration package, which other commands and `kproxy --version` do not need.
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
        if name not in accepted:
            continue
        if name in described:
            import_module(f"kproxy.cli.{name.replace('-', '_')}").add_command(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser, commands.choices


def _reject_first(parser: OneLineParser, first: str) -> None:
    """Print an error for a first argument that is neither a command nor a top-level flag, and exit with code 2.

    Return if it is a top-level flag, such as `--version`.
    """
    if not first.startswith("-"):
        names = ", ".join(COMMANDS)
        parser.error(f"unknown command {first!r}{_did_you_mean(first, COMMANDS) or f'; commands: {names}'}")
    flag = first.partition("=")[0]
    if flag in parser.flags():
        return
    if flag in command_line({"run"})[1]["run"].flags():
        parser.error(f"{flag} must follow a command, for example `kproxy run {first}`")
    parser.reject(first)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
