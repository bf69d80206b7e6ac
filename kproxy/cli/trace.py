"""`kproxy trace`: follow a packet through every table of a node."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, cast

from msgspec import Struct

from kproxy.cli.console import CannotTellError, UsageError
from kproxy.cli.output import ExitCode, add_output_flag, show_report
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.model.types import Protocol

if TYPE_CHECKING:
    from kproxy.diagnose.trace.ask import KernelTrace
    from kproxy.diagnose.trace.cluster_objects import ClusterAddresses
    from kproxy.diagnose.trace.dumps import Dumps

EPILOG = """\
examples:
  # from a pod to a Service, through the rules of this node's kernel
  sudo kproxy trace --from=10.244.1.5 --to=10.96.0.80:80
  # the same with names
  kubectl get pods,svc,endpointslices,nodes -A -o yaml > all.yaml
  sudo kproxy trace --from=pod/shop/cart-0 --to=10.96.0.80:80 --objects=all.yaml
  # another node, from dumps of its rules
  ssh node-2 'iptables-save; ip6tables-save' > iptables.txt
  ssh node-2 nft -j list ruleset > nft.json
  kproxy trace --from=10.244.2.9 --to=10.96.0.53:53/udp \\
      --dump=iptables.txt --dump=nft.json --node-address=10.0.0.2

The packet is the first one of a new connection. It passes all tables of
iptables, iptables-legacy and nftables, whoever wrote them. What cannot be
evaluated, such as the contents of an ipset, is never guessed: both ways are
followed, and if they do not end the same, the answer is UNKNOWN.

A dump is the output of iptables-save, ip6tables-save, `nft list ruleset` or
`nft -j list ruleset`. Dumps contain neither addresses nor routes: pass
--node-address, --in-interface and --objects to make more of the way known.

Exit codes: 0 if the packet reaches an endpoint, 1 if it is dropped, rejected
or meets no rule of a Service, 2 for invalid usage, 3 if it cannot be known."""
_TARGET = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):(\d+)(?:/(tcp|udp|sctp))?", re.IGNORECASE)


class _Target(Struct, frozen=True):
    address: str
    port: int
    protocol: Protocol


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "trace",
        help=COMMANDS["trace"],
        usage="kproxy trace --from=ADDR --to=ADDR:PORT[/PROTOCOL] [FLAGS]",
        description="Follow a packet through every table of a node, rule by rule, to its verdict.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Not `required`: argparse would report a misspelled flag as a missing one.
    parser.add_argument(
        "--from", dest="source", metavar="ADDR", help="source address, or pod/NAMESPACE/NAME of a Pod in --objects"
    )
    parser.add_argument(
        "--to", metavar="ADDR:PORT", help="destination, [ADDR]:PORT for IPv6, with /tcp (default), /udp or /sctp"
    )
    parser.add_argument(
        "--in-interface",
        metavar="NAME",
        help="interface at which the packet arrives (default: from the node's routes; unknown with --dump)",
    )
    parser.add_argument(
        "--dump",
        action="append",
        default=[],
        metavar="FILE",
        help="read the rules from a dump instead of this node's kernel, `-` for standard input; may be repeated",
    )
    parser.add_argument(
        "--node-address",
        action="append",
        default=[],
        metavar="ADDR",
        help="all addresses of the node whose rules are in --dump, separated by commas; may be repeated",
    )
    parser.add_argument(
        "--node", metavar="NAME", help="name of the node whose rules are in --dump, if its Node is in --objects"
    )
    parser.add_argument(
        "--objects",
        metavar="PATH",
        help="file or directory with Pods, Services, EndpointSlices and Nodes as YAML or JSON, for their names and "
        "addresses",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="also watch a real packet and compare; if it comes from elsewhere, send one within 30 seconds",
    )
    add_output_flag(parser)
    parser.set_defaults(command=_trace)


def _trace(options: argparse.Namespace) -> int:
    target = _parse_target(options.to)
    objects = _read_objects(options.objects)
    source, source_port = _parse_source(options.source, target, objects)
    addresses = _node_addresses(options)
    if addresses and not options.dump:
        raise UsageError("--node-address needs --dump: the addresses of this node are known")
    if options.live and options.dump:
        raise UsageError("--live watches packets on this node: it cannot be combined with --dump")
    dumps = _read_dumps(options.dump)

    from kproxy.cli.trace_text import trace_lines
    from kproxy.diagnose.trace.ask import KernelTrace, TracedPacket, trace_dumps
    from kproxy.diagnose.trace.dumps import DumpError
    from kproxy.diagnose.trace.kernel import KernelError

    packet = TracedPacket(
        source=source,
        source_port=source_port,
        source_name=options.source if options.source.startswith("pod/") else "",
        destination=target.address,
        port=target.port,
        protocol=target.protocol,
        interface=options.in_interface,
    )
    try:
        if dumps is not None:
            report = trace_dumps(packet, dumps, addresses, objects, options.node or "")
        else:
            kernel = KernelTrace(packet, objects)
            report = kernel.watch(_ask_for_packet(kernel, source, options.to)) if options.live else kernel.report
    except DumpError as error:
        raise UsageError(f"--dump: {error}") from None
    except KernelError as error:
        raise CannotTellError(str(error)) from None
    show_report(report, options.output, lambda style: trace_lines(report, style))
    return {"works": ExitCode.WORKS, "broken": ExitCode.BROKEN, "unknown": ExitCode.UNKNOWN}[report.answer]


def _ask_for_packet(kernel: KernelTrace, source: str, target: str) -> Callable[[], None]:
    """Return a function that asks people for a packet, unless the node sends it."""

    def ask() -> None:
        if not kernel.node_sends:
            print(f"waiting for a packet from {source} to {target}: send one now", file=sys.stderr)

    return ask


def _parse_target(text: str | None) -> _Target:
    if not text:
        raise UsageError("--to=ADDR:PORT is required: the destination, for example --to=10.96.0.80:80/tcp")
    found = _TARGET.fullmatch(text)
    try:
        if not found:
            raise ValueError
        address = str(ip_address(found[1] or found[2]))
        port = int(found[3])
        if not 0 < port <= 0xFFFF:
            raise ValueError
    except ValueError:
        raise UsageError(f"--to: must be ADDR:PORT[/tcp|udp|sctp] or [IPV6]:PORT[/tcp|udp|sctp], not {text}") from None
    return _Target(address, port, cast("Protocol", (found[4] or "tcp").upper()))


def _parse_source(text: str | None, target: _Target, objects: ClusterAddresses | None) -> tuple[str, int | None]:
    if not text:
        raise UsageError("--from=ADDR is required: the address that sends the packet, or pod/NAMESPACE/NAME")
    port: int | None = None
    if text.startswith("pod/"):
        address = _pod_address(text, target, objects)
    else:
        found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:(\d+)|([0-9.]+):(\d+)", text)
        port = int(found[2] or found[4]) if found else None
        address = (found[1] or found[3]) if found else text
    try:
        parsed = ip_address(address)
    except ValueError:
        raise UsageError(f"--from: must be an IP address or pod/NAMESPACE/NAME, not {text}") from None
    if parsed.version != ip_address(target.address).version:
        raise UsageError("--from and --to must be addresses of the same IP family")
    return str(parsed), port


def _pod_address(text: str, target: _Target, objects: ClusterAddresses | None) -> str:
    if objects is None:
        raise UsageError("--from=pod/NAMESPACE/NAME needs --objects=PATH with this Pod")
    name = text.removeprefix("pod/")
    if name not in objects.pods:
        raise UsageError(f"--from: no Pod {name} in --objects; save it with `kubectl get pods -A -o yaml`")
    version = ip_address(target.address).version
    found = next((each for each in objects.pods[name] if ip_address(each).version == version), "")
    if not found:
        raise UsageError(f"--from: Pod {name} has no IPv{version} address")
    return found


def _node_addresses(options: argparse.Namespace) -> list[str]:
    addresses = [each.strip() for text in options.node_address for each in text.split(",") if each.strip()]
    for address in addresses:
        try:
            ip_address(address)
        except ValueError:
            raise UsageError(f"--node-address: must be an IP address, not {address}") from None
    return addresses


def _read_objects(path: str | None) -> ClusterAddresses | None:
    if not path:
        return None
    from kproxy.diagnose.trace.cluster_objects import read_cluster_objects
    from kproxy.documents.document import DocumentError, FileProblem
    from kproxy.documents.parse import read_documents
    from kproxy.documents.watch import read_path

    snapshot = read_path(path)
    if snapshot.unreadable:
        raise UsageError(f"--objects: {snapshot.unreadable}")
    contents: list[object] = []
    for name, text in snapshot.files.items():
        if isinstance(text, FileProblem):
            continue
        try:
            contents.extend(document.content for document in read_documents(text, allow_duplicate_keys=True))
        except DocumentError as error:
            raise UsageError(f"--objects: {FileProblem(name, str(error), error.line, error.column)}") from None
    return read_cluster_objects(contents)


def _read_dumps(paths: list[str]) -> Dumps | None:
    if not paths:
        return None
    from kproxy.diagnose.trace.dumps import DumpError, Dumps

    dumps = Dumps()
    for path in paths:
        try:
            if path == "-":
                text = sys.stdin.read()
            else:
                with open(path, encoding="utf-8", errors="replace") as file:
                    text = file.read()
        except OSError as error:
            raise UsageError(f"--dump: {path}: {error.strerror}") from None
        try:
            dumps.add(text, path)
        except DumpError as error:
            raise UsageError(f"--dump: {error}") from None
    return dumps
