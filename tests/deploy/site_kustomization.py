"""`deploy/site`, the kustomization for one cluster that README.md and docs/operations.md create with shell commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.deploy.rendered import DEPLOY, ROOT

PAGES = {name: ROOT / name for name in ("README.md", "docs/operations.md")}
IMAGE = "registry.example/kproxy:0.1.0"
"""The image in the commands on both pages."""

_SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> str:
    """Return the commands on a page that create the directory, without those that build and push the image."""
    (block,) = (each for each in _SHELL.findall(page.read_text()) if "deploy/site" in each)
    return "".join(f"{line}\n" for line in block.splitlines() if not line.startswith(("make ", "docker ")))


def make_site(checkout: Path, page: Path = PAGES["README.md"]) -> Path:
    """Copy `deploy` to a new checkout and run the commands on a page there; return the created directory."""
    shutil.copytree(DEPLOY, checkout / "deploy", ignore=shutil.ignore_patterns("site"))
    subprocess.run(["sh", "-ec", commands(page)], cwd=checkout, check=True)
    return checkout / "deploy" / "site"


def kustomization(folder: Path, *lines: str) -> Path:
    """Write a kustomization with these lines to a directory, and return the directory."""
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text("".join(f"{line}\n" for line in lines))
    return folder
