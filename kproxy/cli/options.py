"""Code that several commands share: options, configuration loading, and log setup."""

from __future__ import annotations

import argparse
import logging

from kproxy.cli.console import UsageError
from kproxy.config import Config, ConfigError, configure
from kproxy.config.flag_table import Group

log = logging.getLogger(__name__)
OBJECTS_HELP = (
    "file or directory with Services, EndpointSlices and Nodes as YAML or JSON, "
    "for example the output of `kubectl get svc,endpointslices,nodes -A -o yaml`"
)
SYNTAX = """\
Flags override the --config file. A BOOL is true or false; the flag alone means
true. A flag that takes a list may be repeated."""
"""Flag syntax, for the help of each command that takes flags."""


DAEMON_GROUPS: tuple[Group, ...] = ("API server", "syncing", "health and metrics", "conntrack and memory", "no effect")
"""The groups of flags that the help of the one-shot commands omits, because the flags affect only `kproxy run`.

`--conntrack-tcp-be-liberal` is an exception: in iptables mode, it also omits the rule that drops INVALID packets.
"""


def required_objects(options: argparse.Namespace) -> str:
    """Return the value of `--objects`. Raises `UsageError` if the flag is not set."""
    if not options.objects:
        raise UsageError("--objects=PATH is required: a file or directory with Services, EndpointSlices and Nodes")
    return str(options.objects)


def load_settings(options: argparse.Namespace, content: bytes | None = None) -> Config:
    """Build the configuration from the `--config` file and the flags, and start logging.

    `content` is the content of the file, or None if the caller has not read the file. Problems in the configuration
    that do not prevent its use, such as settings that have no effect, are logged as warnings. Raises `UsageError` if
    the configuration is invalid.
    """
    from kproxy.cli.log_format import start_logging

    try:
        config, warnings = configure(options, content)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    start_logging(config.logging)
    for warning in warnings:
        log.warning("%s", warning)
    return config
