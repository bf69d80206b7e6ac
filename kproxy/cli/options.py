"""What the commands have in common: kube-proxy's flags, the configuration they make, and logging."""

from __future__ import annotations

import argparse
import logging
import sys

from kproxy.cli.errors import UsageError
from kproxy.config import Config, ConfigError, add_flags, configure

OBJECTS_HELP = (
    "a file or folder with Services, EndpointSlices and Nodes as YAML or JSON, such as "
    "`kubectl get svc,endpointslices,nodes -A -o yaml` prints"
)


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
    for warning in warnings:
        logging.getLogger(__name__).warning("%s", warning)
    return config


__all__ = ["OBJECTS_HELP", "add_flags", "load_settings"]
