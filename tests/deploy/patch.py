"""Patches of API objects."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.deploy.rendered import Object


class PatchError(ValueError):
    """A patch that cannot be applied to the object."""


def patched(body: Object, kind: str, patch: str) -> Object:
    """Apply a patch of a type that `kubectl patch --type` accepts. kubectl shares its code with the real API server."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "object.json")
        file.write_text(json.dumps(body))
        command = ["kubectl", "patch", "--local", "-f", str(file), f"--type={kind}", "-p", patch, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PatchError(done.stderr.strip())
    result: Any = json.loads(done.stdout)
    return dict(result)
