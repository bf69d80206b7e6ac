"""The daemon's options and configuration that result from a container's arguments and files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from kproxy.cli import run
from kproxy.config import Config, configure
from tests.deploy.rendered import Object, arguments

FOLDER = "/var/lib/kube-proxy"
"""Mount path of the configuration in the manifests."""


def parsed(container: Object, files: Mapping[str, str], folder: Path) -> tuple[argparse.Namespace, Config]:
    """Parse a container's arguments with the daemon's parser. The mounted files are written to `folder`."""
    for name, content in files.items():
        (folder / name).write_text(content)
    words = [word.replace(FOLDER, str(folder)) for word in arguments(container, "Node-1")]
    parser = argparse.ArgumentParser()
    run.add_command(parser.add_subparsers())
    options = parser.parse_args(words)
    config, warnings = configure(options)
    assert warnings == []
    return options, config
