"""`kproxy bundle`: collect everything that a bug report needs in one archive."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import secrets
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kproxy import __version__
from kproxy.cli.console import CannotTellError, CommandFailedError, UsageError, show
from kproxy.cli.control_client import fetch_configuration, fetch_log, fetch_metrics, fetch_objects, fetch_status
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.diagnose.anonymize import Anonymizer
from kproxy.host import commands
from kproxy.host.commands import CommandError
from kproxy.model.object_page import ObjectPage

EPILOG = """\
examples:
  # on the node
  sudo kproxy bundle
  # from a laptop: the daemon's pod on one node
  kubectl -n kube-system exec kproxy-x7k2p -- kproxy bundle - > bundle.tar.gz
  # without the names of your Services, namespaces and nodes
  sudo kproxy bundle --anonymize bundle.tar.gz
  # what a bundle is good for
  tar xzf bundle.tar.gz
  kproxy render --objects=kproxy-bundle/objects.json

The archive contains versions, the configuration, the state, the metrics and the
latest log lines of the daemon, the Services, EndpointSlices and this Node as
the daemon knows them, all rules of iptables and nftables, addresses, routes and
kernel parameters. It contains no keys and no tokens, but IP addresses, and
without --anonymize also names. What could not be collected is in problems.txt.

Only root may read the rules and ask the daemon."""
FOLDER = "kproxy-bundle"
TIMEOUT_SECONDS = 120.0
PROGRAMS = {
    "iptables-save.txt": ("iptables-save", "-c"),
    "ip6tables-save.txt": ("ip6tables-save", "-c"),
    "iptables-legacy-save.txt": ("iptables-legacy-save", "-c"),
    "ip6tables-legacy-save.txt": ("ip6tables-legacy-save", "-c"),
    "nft-ruleset.txt": ("nft", "-a", "list", "ruleset"),
    "nft-ruleset.json": ("nft", "-j", "list", "ruleset"),
    "addresses.txt": ("ip", "address"),
    "routes.txt": ("ip", "route", "show", "table", "all"),
    "routes-ipv6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "conntrack-statistics.txt": ("conntrack", "-S"),
    "modules.txt": ("lsmod",),
}
"""The programs whose output is collected, by the name of the file that gets it."""
VERSION_PROGRAMS = (("iptables", "--version"), ("nft", "--version"), ("conntrack", "--version"))
PARAMETER_FOLDERS = ("proc/sys/net/netfilter", "proc/sys/net/bridge", "proc/sys/net/ipv4/conf/all")
PARAMETERS = ("proc/sys/net/ipv4/ip_forward", "proc/sys/net/ipv6/conf/all/forwarding")


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = subparsers.add_parser(
        "bundle",
        help=COMMANDS["bundle"],
        usage="kproxy bundle [FILE] [--anonymize]",
        description="Collect everything that a bug report needs in one archive.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="archive to write, or - for standard output")
    parser.add_argument(
        "--anonymize", action="store_true", help="replace the names of Services, namespaces and nodes by hashes"
    )
    parser.set_defaults(command=_bundle)


def _bundle(options: argparse.Namespace) -> None:
    if os.geteuid():
        raise CannotTellError("only root may read the rules and ask the daemon: run this command as root")
    if options.file == "-" and sys.stdout.isatty():
        raise UsageError("refusing to write an archive to a terminal: redirect the output to a file")
    path = options.file or time.strftime("kproxy-bundle-%Y%m%d-%H%M%S.tar.gz", time.gmtime())
    anonymizer = Anonymizer(secrets.token_bytes(16)) if options.anonymize else None
    data = archive(collect(anonymizer))
    try:
        if path == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            # Only root may read it, and it must not overwrite a file or follow a link that somebody else has put there.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(data)
            show(f"{path}\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandFailedError(f"{path}: cannot write: {error.strerror}") from None


def archive(files: Mapping[str, str]) -> bytes:
    """Return a compressed tar archive with text files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            content = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def collect(anonymizer: Anonymizer | None) -> dict[str, str]:
    """Return the content of all files, by name. With an `anonymizer`, names are replaced."""
    problems: list[str] = []
    files: dict[str, str] = {}

    def add(name: str, read: Callable[[], str]) -> None:
        try:
            files[name] = read()
        except (CannotTellError, OSError, CommandError) as error:
            problems.append(f"{name}: {error}")

    add("objects.json", lambda: _objects_text(list(fetch_objects()), anonymizer))
    add("versions.txt", _versions)
    add("status.json", lambda: _json(_status()))
    add("configuration.json", lambda: _json(fetch_configuration()))
    add("log.txt", lambda: "".join(f"{line}\n" for line in fetch_log()))
    add("metrics.txt", fetch_metrics)
    for name, command in PROGRAMS.items():
        add(name, lambda command=command: _output(command))  # type: ignore[misc]
    add("parameters.txt", _parameters)
    files["problems.txt"] = "".join(f"{line}\n" for line in problems) or "none\n"
    if anonymizer is None:
        return files
    anonymizer.add_nodes([platform.node()])
    return {name: text if name == "objects.json" else anonymizer.text(text) for name, text in files.items()}


def _objects_text(pages: list[ObjectPage], anonymizer: Anonymizer | None) -> str:
    from kproxy.kube.manifests.encode import node_manifest, service_manifest, slice_manifest

    services = [service for page in pages for service in page.services]
    slices = [each for page in pages for each in page.slices]
    node = pages[-1].node
    if anonymizer is not None:
        from kproxy.diagnose.anonymize import anonymous_node, anonymous_service, anonymous_slice

        anonymizer.add_objects(service.key for service in services)
        anonymizer.add_objects(f"{each.namespace}/{each.name}" for each in slices)
        anonymizer.add_nodes({endpoint.node for each in slices for endpoint in each.endpoints})
        anonymizer.add_nodes([node.name] if node else [])
        services = [anonymous_service(service, anonymizer) for service in services]
        slices = [anonymous_slice(each, anonymizer) for each in slices]
        node = anonymous_node(node, anonymizer) if node else None
    items = [*map(service_manifest, services), *map(slice_manifest, slices), *([node_manifest(node)] if node else [])]
    items += [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": f"range-{number}"},
            "spec": {"cidrs": [cidr]},
        }
        for number, cidr in enumerate(pages[-1].service_cidrs)
    ]
    return _json({"apiVersion": "v1", "kind": "List", "items": items})


def _status() -> object:
    from kproxy.cli.status import host_findings, read_conntrack
    from kproxy.diagnose.report import document
    from kproxy.diagnose.status import make_status

    daemon = fetch_status()
    return document(make_status(daemon, read_conntrack(), host_findings(daemon)))


def _versions() -> str:
    lines = [f"kproxy {__version__}", f"Python {platform.python_version()}", " ".join(platform.uname())]
    for command in VERSION_PROGRAMS:
        try:
            lines.append(_output(command).strip())
        except CommandError as error:
            lines.append(f"{command[0]}: {error}")
    return "".join(f"{line}\n" for line in lines)


def _output(command: Sequence[str]) -> str:
    done = commands.run(command, timeout=TIMEOUT_SECONDS)
    if done.code and not done.stdout:
        raise CommandError(done.error_message)
    return done.stdout + "".join(f"# {line}\n" for line in done.stderr.splitlines())


def _parameters() -> str:
    def values() -> Iterator[str]:
        folders = (path for folder in PARAMETER_FOLDERS for path in sorted(Path("/", folder).glob("*")))
        for path in (*folders, *(Path("/", name) for name in PARAMETERS)):
            try:
                yield f"{path}: {path.read_text().strip()}\n"
            except OSError:
                continue

    return "".join(values())


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"
