"""`kproxy doctor`: check this node before and after kproxy is installed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from textwrap import wrap

from kproxy.cli.options import SYNTAX, load_settings
from kproxy.cli.output import WIDTH, ExitCode, Style, add_output_flag, show_report
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config
from kproxy.config.flag_table import Group
from kproxy.config.flags import add_flags
from kproxy.diagnose.doctor import DoctorReport, doctor_report
from kproxy.diagnose.facts import HostFacts
from kproxy.diagnose.finding import Finding
from kproxy.model.printable_text import MAX_LENGTH, printable
from kproxy.model.types import Family

EPILOG = f"""\
examples:
  # before the installation: check the node for nftables mode
  sudo kproxy doctor --proxy-mode=nftables
  # with the configuration that kproxy uses: also checks the API server
  sudo kproxy doctor --config=/var/lib/kube-proxy/config.conf
  # without root: checks everything that needs no privileges
  kproxy doctor --kubeconfig=$HOME/.kube/config --hostname-override=node-1
  # in kproxy's Pod
  kubectl -n kube-system exec ds/kproxy -- kproxy doctor \\
      --config=/var/lib/kube-proxy/config.conf
  # the reason codes of everything that is broken
  sudo kproxy doctor -o json \\
      | jq -r '.findings[] | select(.severity == "error") | .code'

{SYNTAX}
Other flags of `kproxy run`, except its actions, are accepted too.

Changes nothing on the node. The exit code is 0 if nothing is wrong, 1 if there
are errors or warnings, 2 if the flags or the configuration are invalid, and 3
if nothing is wrong but some checks need root."""
HIDDEN: tuple[Group, ...] = ("syncing", "no effect")
_MARGIN = 9
"""Width of the column with the severity."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "doctor",
        help=COMMANDS["doctor"],
        usage="kproxy doctor [-o text|json|yaml] [FLAGS]",
        description="Check whether kproxy can work on this node, and what may disturb it.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_output_flag(parser)
    add_flags(parser, once=True, hidden=HIDDEN)
    parser.set_defaults(command=_doctor)


def host_facts(config: Config, server: str | None, *, ask_api: bool = True) -> HostFacts:
    """Return the facts about this node. `server` is the value of `--master`.

    With `ask_api` false, the API server is not asked, and no kubeconfig is read.
    """
    from kproxy.app.node_port_addresses import localhost_node_ports
    from kproxy.diagnose.host_facts import gather
    from kproxy.iptables.variant import use_host_variant

    use_host_variant(os.environ)
    return gather(
        config, server, localhost_node_ports=lambda config: localhost_node_ports(config, Family.IPV4), ask_api=ask_api
    )


def _doctor(options: argparse.Namespace) -> int:
    config = load_settings(options)
    report = doctor_report(host_facts(config, options.master))
    show_report(report, options.output, partial(report_lines, report))
    return exit_code(report)


def exit_code(report: DoctorReport) -> ExitCode:
    """Return the exit code for a report."""
    if report.errors or report.warnings:
        return ExitCode.BROKEN
    return ExitCode.WORKS if report.complete else ExitCode.UNKNOWN


def report_lines(report: DoctorReport, style: Style) -> Iterator[str]:
    """Yield the report as text for people."""
    yield style.bold(f"Node {report.node_name}: {report.mode} mode, Linux {report.kernel}")
    yield ""
    for finding in report.findings:
        yield from _finding_lines(finding, style)
    yield ""
    yield summary(report, style)


def summary(report: DoctorReport, style: Style) -> str:
    """Return the last line: how many findings of each severity there are, and whether anything was not checked."""
    passed = sum(each.severity == "ok" for each in report.findings)
    infos = sum(each.severity == "info" for each in report.findings)
    parts = [
        style.bad(_count(report.errors, "error")) if report.errors else "",
        style.warning(_count(report.warnings, "warning")) if report.warnings else "",
        f"{infos} for information" if infos else "",
        style.good(f"{passed} passed"),
    ]
    incomplete = "" if report.complete else "; some checks need root"
    return f"{', '.join(part for part in parts if part)}{incomplete}"


def _finding_lines(finding: Finding, style: Style) -> Iterator[str]:
    paint = {"error": style.bad, "warning": style.warning, "info": style.dim, "ok": style.good}[finding.severity]
    first, *rest = _wrapped(f"{finding.code}: {printable(finding.message, MAX_LENGTH)}", "")
    code, colon, text = first.partition(":")
    yield f"{paint(finding.severity)}{' ' * (_MARGIN - len(finding.severity))}{style.bold(code)}{colon}{text}"
    yield from rest
    if finding.action:
        yield from _wrapped(printable(finding.action, MAX_LENGTH), "-> ")


def _wrapped(text: str, mark: str) -> list[str]:
    """Return a text in lines of at most `WIDTH` characters. The lines after the first are indented."""
    indent = " " * _MARGIN
    lines = wrap(
        text,
        WIDTH,
        initial_indent=f"{indent}{mark}",
        subsequent_indent=indent + " " * max(len(mark), 2),
        break_on_hyphens=False,
        break_long_words=True,
    )
    return [lines[0].strip(), *lines[1:]] if not mark else lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
