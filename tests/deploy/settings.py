"""What the arguments and files of a container mean to the daemon."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from kproxy.cli import run
from kproxy.config import Config, configure
from tests.deploy.rendered import Object, arguments

FOLDER = "/var/lib/kube-proxy"
"""Where the manifests mount the configuration."""


def parsed(of: Object, files: Mapping[str, str], folder: Path) -> tuple[argparse.Namespace, Config]:
    """Parse a container's arguments with the daemon's own parser; `folder` gets the files that the container mounts."""
    for name, content in files.items():
        (folder / name).write_text(content)
    words = [word.replace(FOLDER, str(folder)) for word in arguments(of, "Node-1")]
    parser = argparse.ArgumentParser()
    run.add_command(parser.add_subparsers())
    options = parser.parse_args(words)
    config, warnings = configure(options)
    assert warnings == []
    return options, config
