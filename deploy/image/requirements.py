"""`python3 requirements.py pyproject.toml`: print kproxy's dependencies in the format of a requirements file.

The image installs the dependencies in a layer of their own, which is rebuilt only when they change.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["completion"]]
    sys.stdout.writelines(f"{line}\n" for line in lines)
