"""What the commands have in common: kube-proxy's flags, the configuration they make, and logging."""

from __future__ import annotations

import argparse
import logging

from kproxy.cli.console import UsageError
from kproxy.config import Config, ConfigError, add_flags, configure
from kproxy.config.flag_table import Group

log = logging.getLogger(__name__)
OBJECTS_HELP = (
    "a file or folder with Services, EndpointSlices and Nodes as YAML or JSON, such as "
    "`kubectl get svc,endpointslices,nodes -A -o yaml` prints"
)
SYNTAX = """\
A flag that is given wins over the file of --config. A DURATION is written as
30s, 1m30s or 250ms. A BOOL is true or false, and the flag alone means true.
Lists may be given in parts: the flag more than once."""
"""How flags are written, for the help of each command that takes them."""


OF_THE_DAEMON: tuple[Group, ...] = ("API server", "syncing", "health and metrics", "conntrack and memory", "no effect")
"""The flags that mean nothing to a command that does its work once."""


def needed_objects(options: argparse.Namespace) -> str:
    """Return what `--objects` names, where a command cannot do without. Raises `UsageError`."""
    if not options.objects:
        raise UsageError("--objects=PATH is missing: a file or folder with Services, EndpointSlices and Nodes")
    return str(options.objects)


def load_settings(options: argparse.Namespace, content: bytes | None = None) -> Config:
    """Return the configuration that the flags and the file behind `--config` make. Raises `UsageError`.

    `content` is what that file holds, if it has been read already. Starts logging, as the configuration says, and logs
    what of it has no effect.
    """
    from kproxy.cli.logs import start_logging

    try:
        config, warnings = configure(options, content)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    start_logging(config.logging)
    for warning in warnings:
        log.warning("%s", warning)
    return config


__all__ = ["OBJECTS_HELP", "OF_THE_DAEMON", "SYNTAX", "add_flags", "load_settings", "needed_objects"]
