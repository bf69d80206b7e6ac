"""`python3 requirements.py pyproject.toml`: print what kproxy depends on, a line each, as pip reads it.

So that an image's layer with the dependencies is built anew only when these change.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["completion"]]
    sys.stdout.writelines(f"{line}\n" for line in lines)
