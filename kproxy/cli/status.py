"""`kproxy status`: show the state of the daemon on this node."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from kproxy.cli.console import show
from kproxy.cli.control_client import fetch_status
from kproxy.cli.output import ExitCode, Style, add_output_flag, show_report, table, terminal_style
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config.types import Mode
from kproxy.diagnose.finding import Finding
from kproxy.diagnose.status import ConntrackUse, Status, make_status
from kproxy.host.sysctl import read_parameters
from kproxy.model.daemon_status import DaemonStatus, FamilyStatus

EPILOG = """\
examples:
  # in the daemon's pod on one node
  kubectl -n kube-system exec ds/kproxy -- kproxy status
  # on the node, again every 2 seconds
  sudo kproxy status --watch
  # for a program
  kproxy status -o json | jq .problems

exit codes: 0 healthy, 1 degraded or unhealthy, 2 invalid usage, 3 no daemon
answers.

Only root may ask the daemon."""
WATCH_SECONDS = 2.0
SHOWN_PROBLEMS = 20
_CONNTRACK = ("proc/sys/net/netfilter/nf_conntrack_count", "proc/sys/net/netfilter/nf_conntrack_max")
_CLEAR = "\x1b[H\x1b[2J"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "status",
        help=COMMANDS["status"],
        usage="kproxy status [--watch] [-o FORMAT]",
        description="Show the state of the daemon on this node.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-w", "--watch", action="store_true", help=f"show it again every {WATCH_SECONDS:.0f} seconds")
    add_output_flag(parser)
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    daemon = fetch_status()
    host = host_findings(daemon)
    while True:
        report = make_status(daemon, read_conntrack(), host)
        if options.watch and options.output == "text" and terminal_style().colored:
            show(_CLEAR)
        show_report(report, options.output, lambda style, report=report: status_lines(report, style))  # type: ignore[misc]
        if not options.watch:
            return ExitCode.WORKS if report.health == "Healthy" else ExitCode.BROKEN
        try:
            time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            return ExitCode.WORKS
        daemon = fetch_status()


def host_findings(daemon: DaemonStatus) -> tuple[Finding, ...]:
    """Return what `kproxy doctor` finds on this node without asking the API server.

    Of what the daemon has answered, only its mode and the name of the node are used: paths are those of its container,
    and nothing that comes from a socket may decide which files this command reads.
    """
    from kproxy.cli.doctor import host_facts
    from kproxy.config import Config
    from kproxy.diagnose.doctor import findings

    mode: Mode = "iptables" if daemon.mode == "iptables" else "nftables"
    return findings(host_facts(Config(mode=mode, hostname_override=daemon.node), None, ask_api=False))


def read_conntrack() -> ConntrackUse | None:
    """Return the use of the conntrack table, or None if it is unknown."""
    found = read_parameters(_CONNTRACK)
    if len(found) < len(_CONNTRACK):
        return None
    entries, maximum = (found[path] for path in _CONNTRACK)
    return ConntrackUse(entries=entries, maximum=maximum)


def status_lines(report: Status, style: Style) -> Iterator[str]:
    """Yield the lines for people."""
    daemon = report.daemon
    paint = {"Healthy": style.good, "Degraded": style.warning, "Unhealthy": style.bad}[report.health]
    yield f"{style.bold('kproxy ' + daemon.version)} on node {daemon.node}, {daemon.mode} mode  {paint(report.health)}"
    for problem in report.problems:
        yield f"  {style.bad('x') if problem.unhealthy else style.warning('!')} {problem.reason}: {problem.text}"
    yield ""
    contact = daemon.objects.contact_seconds_ago
    ages = ", ".join(f"{kind} {duration(age)}" for kind, age in sorted(contact.items()))
    rows = [
        ("running for", f"{duration(daemon.up_seconds)}, process {daemon.pid}, {size(daemon.memory_bytes)} of memory"),
        ("objects from", daemon.objects.source + ("" if daemon.objects.complete else " (incomplete)")),
    ]
    if ages:
        rows.append(("last message", f"{ages} ago"))
    if report.conntrack is not None:
        used, most = report.conntrack.entries, report.conntrack.maximum
        share = f" ({100 * used / most:.0f} %)" if most else ""
        rows.append(("conntrack", f"{used:,} of {most:,} entries{share}"))
    yield from table(rows)
    for finding in report.host:
        mark = style.bad("x") if finding.severity == "error" else style.warning("!")
        yield f"host          {mark} {finding.code}: {finding.message}"
    for family in daemon.families:
        yield ""
        yield from _family_lines(family, style)


def _family_lines(family: FamilyStatus, style: Style) -> Iterator[str]:
    services = family.services
    yield style.bold(family.family)
    success = family.last_success_seconds_ago
    last = "never" if success is None else f"{duration(success)} ago, took {duration(family.last_sync_seconds)}"
    rows = [
        ("last sync", last + (f", {family.failures:,} failed since the start" if family.failures else "")),
        ("pending", f"{family.pending:,} Services" if family.pending else "nothing"),
    ]
    others = {
        "without endpoints": services.without_endpoints,
        "dropped by a Local policy": services.dropped_by_local_policy,
        "in conflict": services.in_conflict,
        "quarantined": services.quarantined,
        "invalid": services.invalid,
        "ignored": services.ignored,
    }
    named = "".join(f", {number:,} {name}" for name, number in others.items() if number)
    rows.append(("Services", f"{services.programmed:,} programmed{named}"))
    rows.append(("repairs", f"{family.repairs:,} of changes by others" if family.repairs else "none needed"))
    yield from table(rows, indent="  ")
    for repair in family.last_repairs[-3:]:
        by = " or ".join(repair.by) or "another process"
        yield f"    {duration(repair.seconds_ago)} ago: {', '.join(repair.parts[:2])}, changed by {by}"
    for problem in family.problems[:SHOWN_PROBLEMS]:
        yield f"    {problem.service}: {problem.problem}"
    if (more := len(family.problems) - SHOWN_PROBLEMS) > 0:
        yield f"    and {more} more; see -o json"


def duration(seconds: float) -> str:
    """Return a time span for people: `0.4 s`, `35 s`, `12 min`, `5 h`, `3 d`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def size(number: int) -> str:
    """Return a number of bytes for people."""
    return f"{number / (1 << 20):.0f} MiB"
