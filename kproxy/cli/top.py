"""`kproxy top`: show the connections to Services and their endpoints, as the kernel counts them."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator

from msgspec.structs import replace

from kproxy.cli.console import CannotTellError, CommandFailedError, UsageError, show
from kproxy.cli.output import ExitCode, Style, add_output_flag, show_report, table, terminal_style
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.diagnose.top import CountedAddress, Elapsed, Top, TopMode, TopQuery, make_top
from kproxy.model.connection_counts import Counts, CountsUnavailableError

EPILOG = """\
examples:
  # the Services with the most connections, in the daemon's pod on one node
  kubectl -n kube-system exec ds/kproxy -- kproxy top -n 10
  # one Service, with its endpoints
  sudo kproxy top shop/web
  # new connections per second, again every 2 seconds
  sudo kproxy top --watch
  # the rates of one minute, for a program
  sudo kproxy top --interval=60 -o json | jq '.services[0]'

A connection is counted when its first packet arrives, also if it fails later.
Counters start at 0 when kproxy programs an endpoint or a frontend. In nftables
mode, they exist only if kproxy.connectionCounters is true in the configuration
of kproxy, and the endpoints of Services with session affinity are not counted.

exit codes: 0 success, 1 no such Service, 2 invalid usage, 3 the counters do
not exist or cannot be read.

Only root may read the counters. No daemon needs to run."""
WATCH_SECONDS = 2.0
MAX_SECONDS = 86_400.0
_CLEAR = "\x1b[H\x1b[2J"
_OTHER_LINES = 4
"""Lines that `top_lines` adds to those of the Services, and the one with the cursor."""
_ORDERS = ("connections", "rate", "name")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "top",
        help=COMMANDS["top"],
        usage="kproxy top [NAMESPACE/SERVICE] [FLAGS]",
        description="Show how many connections Services and endpoints have received on this node.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("service", metavar="NAMESPACE/SERVICE", nargs="?", default="", help="show only this Service")
    parser.add_argument("-w", "--watch", action="store_true", help="show rates, again after each interval")
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        help=f"show the rates of this time (default with --watch: {WATCH_SECONDS:.0f})",
    )
    parser.add_argument(
        "--sort", choices=_ORDERS, metavar="ORDER", help="connections (default), rate (default with rates) or name"
    )
    parser.add_argument("--endpoints", action="store_true", help="show the frontends and endpoints of each Service")
    parser.add_argument("-n", "--number", metavar="N", help="show only the first N lines of Services")
    add_output_flag(parser)
    parser.set_defaults(command=_top)


def _top(options: argparse.Namespace) -> int:
    try:
        return _show(options)
    except KeyboardInterrupt:
        return ExitCode.WORKS


def _show(options: argparse.Namespace) -> int:
    seconds = _interval(options)
    query = _query(options, has_rates=seconds is not None)
    on_screen = options.watch and options.output == "text" and terminal_style().colored
    if on_screen and not query.limit:
        query = replace(query, limit=max(shutil.get_terminal_size().lines - _OTHER_LINES, 1))
    from kproxy.app.connection_counts import read_counts
    from kproxy.iptables.variant import use_host_variant

    use_host_variant(os.environ)

    def read() -> tuple[TopMode, Counts, float]:
        try:
            mode, counts = read_counts(endpoints=query.details)
        except CountsUnavailableError as error:
            raise CannotTellError(str(error)) from None
        return mode, counts, time.monotonic()

    mode, counts, now = read()
    earlier: Elapsed | None = None
    while True:
        if seconds is not None:
            before, began = counts, now
            time.sleep(seconds)
            mode, counts, now = read()
            earlier = Elapsed(before, now - began)
        report = make_top(mode, counts, earlier, query)
        if query.service and not report.services:
            raise CommandFailedError(
                f"no connections of Service {query.service} are counted on this node: it does not exist, or it has no "
                "endpoints"
            )
        if on_screen:
            show(_CLEAR)
        show_report(report, options.output, lambda style, report=report: top_lines(report, query, style))  # type: ignore[misc]
        if not options.watch:
            return ExitCode.WORKS


def _interval(options: argparse.Namespace) -> float | None:
    if options.interval is None:
        return WATCH_SECONDS if options.watch else None
    try:
        seconds = float(options.interval)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"--interval must be a positive number of seconds, not {options.interval!r}")
    return seconds


def _query(options: argparse.Namespace, *, has_rates: bool) -> TopQuery:
    namespace, _, name = options.service.partition("/")
    if options.service and (not namespace or not name or "/" in name or ":" in name):
        raise UsageError(f"the Service must be given as NAMESPACE/SERVICE, not {options.service!r}")
    if options.sort == "rate" and not has_rates:
        raise UsageError("--sort=rate needs --watch or --interval=SECONDS")
    if options.number is not None and not (options.number.isdecimal() and int(options.number)):
        raise UsageError(f"--number must be a positive integer, not {options.number!r}")
    return TopQuery(
        service=options.service,
        order=options.sort or ("rate" if has_rates else "connections"),
        limit=int(options.number or 0),
        details=options.endpoints or bool(options.service),
    )


def top_lines(report: Top, query: TopQuery, style: Style) -> Iterator[str]:
    """Yield the lines for people."""
    rows = [("SERVICE", "CONNECTIONS", "RATE")]
    for each in report.services:
        name = f"{each.namespace}/{each.service}" + (f":{each.port}" if each.port else "")
        rows.append((name, *_numbers(each.connections, each.rate)))
        rows += _address_rows("from", each.frontends)
        rows += _address_rows("to", each.endpoints)
        if query.details and report.mode == "nftables" and not each.endpoints:
            rows.append(("  to endpoints: not counted because of session affinity", "", ""))
    rows.append(("all" if not query.service else "total", *_numbers(report.connections, report.rate)))
    columns = 2 if report.seconds is None else 3
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    aligned = [[row[0], *(row[column].rjust(widths[column]) for column in range(1, columns))] for row in rows]
    head, *body, last = table(aligned)
    yield style.dim(head)
    yield from body
    if report.omitted:
        yield style.dim(f"and {report.omitted:,} more")
    yield style.bold(last)


def _address_rows(direction: str, addresses: tuple[CountedAddress, ...]) -> list[tuple[str, str, str]]:
    return [(f"  {direction} {each.address}", *_numbers(each.connections, each.rate)) for each in addresses]


def _numbers(connections: int, rate: float | None) -> tuple[str, str]:
    return f"{connections:,}", "" if rate is None else f"{rate:,.1f}/s"
