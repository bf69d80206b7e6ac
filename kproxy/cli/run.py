"""`kproxy run`: the daemon."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from kproxy.cli.console import CommandFailedError, show
from kproxy.cli.options import OBJECTS_HELP, SYNTAX, load_settings
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config import Config, configure, to_yaml
from kproxy.config.flags import add_flags

EPILOG = f"""\
examples:
  # replace kube-proxy in its Pod, which mounts kubeadm's configuration file
  kproxy run --config=/var/lib/kube-proxy/config.conf --hostname-override=node-1
  # connect to a cluster with a kubeconfig
  kproxy run --kubeconfig=$HOME/.kube/config --cluster-cidr=10.244.0.0/16
  # nftables mode, dual-stack; NodePorts only on one network
  kproxy run --proxy-mode=nftables --cluster-cidr=10.244.0.0/16,fd00:10::/56 \\
      --nodeport-addresses=192.168.0.0/24
  # at most two syncs per second; health and metrics on loopback only
  kproxy run --iptables-min-sync-period=500ms \\
      --healthz-bind-address=127.0.0.1 --metrics-bind-address=127.0.0.1
  # run without a cluster: watch the files in a directory
  kproxy run --objects=./cluster/ --hostname-override=node-1
  # log debug messages
  kproxy run --objects=web.yaml -v=4
  # set kernel parameters in a privileged init container, then exit
  kproxy run --init-only --config=/var/lib/kube-proxy/config.conf
  # write a configuration file with these flags and all defaults, then exit
  kproxy run --write-config-to=config.yaml --proxy-mode=nftables
  # stop proxying on this node: remove the rules of all modes, then exit
  kproxy run --cleanup

{SYNTAX}
A DURATION is written as 30s, 1m30s or 250ms.

Without --objects, and without a kubeconfig from --kubeconfig or the --config
file, kproxy uses the Pod's service account. SIGTERM stops kproxy and leaves
the rules in place. SIGUSR1 and SIGQUIT write the stacks of all threads to
stderr. SIGHUP and SIGUSR2 are ignored."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "run",
        help=COMMANDS["run"],
        usage="kproxy run [--objects=PATH] [FLAGS]",
        description="Keep this node's rules in sync with the Services in a cluster or in files.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objects", metavar="PATH", help=f"instead of an API server, watch a {OBJECTS_HELP}")
    add_flags(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    # Read the file only once. The watcher later compares the file with this content, so that it also finds edits that
    # were made before it started.
    content = _read(options.config)
    config = load_settings(options, content or None)
    if options.write_config_to:
        _write_config(config, options.write_config_to)
        return
    from kproxy.iptables.variant import use_host_variant

    use_host_variant(os.environ)
    if options.cleanup:
        _clean_up()
    elif options.init_only:
        _prepare(config)
    else:
        _run_daemon(config, options, content)


def _read(path: str | None) -> bytes:
    try:
        # Do not read a pipe now: it can be read only once, by `load_settings`, and it is not watched.
        return Path(path).read_bytes() if path and Path(path).is_file() else b""
    except OSError:
        return b""  # `load_settings` tries to read the file again and reports the error


def _run_daemon(config: Config, options: argparse.Namespace, content: bytes) -> None:
    from kproxy.app import daemon
    from kproxy.app.backends import StartError
    from kproxy.cli.log_format import keep_recent_lines
    from kproxy.config.flags import flag_values
    from kproxy.serve.status_server import ListenError

    try:
        load = partial(configure, options)
        file = daemon.ConfigFile(options.config, content, load) if options.config else None
        flags = partial(flag_values, config, options)
        daemon.run(
            config,
            objects=options.objects,
            server=options.master,
            file=file,
            flags=flags,
            own_log=keep_recent_lines(),
        )
    except (StartError, ListenError, daemon.RestartNeededError) as error:
        raise CommandFailedError(str(error)) from None


def _prepare(config: Config) -> None:
    from kproxy.app.backends import StartError, check_privileges
    from kproxy.app.kernel_parameters import prepare_conntrack, prepare_localhost_node_ports

    try:
        check_privileges()
    except StartError as error:
        raise CommandFailedError(str(error)) from None
    prepare_conntrack(config)
    prepare_localhost_node_ports(config)


def _write_config(config: Config, path: str) -> None:
    try:
        Path(path).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise CommandFailedError(f"--write-config-to {path}: {error.strerror}") from None


def _clean_up() -> None:
    from kproxy.app.backends import StartError, check_privileges
    from kproxy.app.cleanup import remove_all
    from kproxy.host.commands import CommandError

    try:
        check_privileges()
        found = False
        for line in remove_all():
            show(f"{line}\n")
            found = True
        if not found:
            show("nothing to remove\n")
    except (StartError, CommandError) as error:
        raise CommandFailedError(str(error)) from None
