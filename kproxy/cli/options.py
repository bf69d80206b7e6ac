"""What the commands have in common: kube-proxy's flags, the configuration they make, and logging."""

from __future__ import annotations

import argparse
import logging
import sys

from kproxy.cli.errors import UsageError
from kproxy.config import Config, ConfigError, add_flags, configure
from kproxy.config.flag_table import Group

OBJECTS_HELP = (
    "a file or folder with Services, EndpointSlices and Nodes as YAML or JSON, such as "
    "`kubectl get svc,endpointslices,nodes -A -o yaml` prints"
)

SYNTAX = """\
A flag that is given wins over the file of --config. A DURATION is written as
30s, 1m30s or 250ms. A BOOL is true or false, and the flag alone means true.
Lists may be given in parts: the flag more than once."""
"""How flags are written, for the help of each command that takes them."""


OF_THE_DAEMON: tuple[Group, ...] = ("what is followed", "sync", "serving", "conntrack and memory", "without effect")
"""The flags that mean nothing to a command that does its work once."""


def needed_objects(options: argparse.Namespace) -> str:
    """Return what `--objects` names, where a command cannot do without. Raises `UsageError`."""
    if not options.objects:
        raise UsageError("--objects=PATH is missing: a file or folder with Services, EndpointSlices and Nodes")
    return str(options.objects)


def load_settings(options: argparse.Namespace) -> Config:
    """Return the configuration that the flags and the file behind `--config` make. Raises `UsageError`.

    Starts logging, since what the configuration ignores is said as a warning.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    try:
        config, warnings = configure(options)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if config.logging.verbosity >= 4:
        logging.getLogger().setLevel(logging.DEBUG)
    else:
        # Its warnings are about details of connections; what fails, kproxy logs itself.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
    for warning in warnings:
        logging.getLogger(__name__).warning("%s", warning)
    return config


__all__ = ["OBJECTS_HELP", "OF_THE_DAEMON", "SYNTAX", "add_flags", "load_settings", "needed_objects"]
