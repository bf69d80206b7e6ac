"""`kproxy run`: the daemon."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from kproxy.cli.errors import FailureError
from kproxy.cli.options import OBJECTS_HELP, add_flags, load_settings
from kproxy.config import Config, to_yaml

EPILOG = """\
examples:
  kproxy run --config=/var/lib/kube-proxy/config.conf --hostname-override=$NODE_NAME
  kproxy run --kubeconfig=$HOME/.kube/config --cluster-cidr=10.244.0.0/16
  kproxy run --objects=./cluster/ --hostname-override=node-1

Without --kubeconfig and --objects it uses the Pod's service account. SIGTERM ends it and leaves the rules in place."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "run",
        help="keep the node's rules after the cluster (or files), until told to stop",
        usage="kproxy run [--objects PATH] [FLAGS]",
        description="Keep this node's rules after the Services and EndpointSlices of a cluster or of files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", help=f"follow {OBJECTS_HELP}, instead of an API server")
    add_flags(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    # Before it is parsed: a change right after that must not go unnoticed.
    content = _read(options.config)
    config = load_settings(options)
    if options.write_config_to:
        _write_config(config, options.write_config_to)
        return
    from kproxy.host.iptables_variant import use_hosts_variant

    use_hosts_variant(os.environ)
    if options.cleanup:
        _clean_up()
    elif options.init_only:
        _prepare(config)
    else:
        _serve(config, options, content)


def _read(path: str | None) -> bytes:
    try:
        # A pipe can be read only once, and not here.
        return Path(path).read_bytes() if path and Path(path).is_file() else b""
    except OSError:
        return b""  # reading it for good says what is wrong


def _serve(config: Config, options: argparse.Namespace, content: bytes) -> None:
    from kproxy import daemon
    from kproxy.families import StartError
    from kproxy.serve.serving import ServingError

    try:
        file = daemon.ConfigFile(options.config, content) if options.config else None
        daemon.run(config, objects=options.objects, server=options.master, file=file)
    except (StartError, ServingError, daemon.ConfigChangedError) as error:
        raise FailureError(str(error)) from None


def _prepare(config: Config) -> None:
    from kproxy.families import with_mode
    from kproxy.preparation import prepare_conntrack, prepare_localhost_node_ports

    config = with_mode(config)
    prepare_conntrack(config)
    prepare_localhost_node_ports(config)


def _write_config(config: Config, path: str) -> None:
    try:
        Path(path).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise FailureError(f"--write-config-to {path}: {error.strerror}") from None


def _clean_up() -> None:
    from kproxy.host.run import CommandError
    from kproxy.leftovers import remove_all

    try:
        for line in remove_all() or ["there was nothing to remove"]:
            print(line)
    except CommandError as error:
        raise FailureError(str(error)) from None
