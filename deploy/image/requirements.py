"""`python3 requirements.py pyproject.toml`: print kproxy's dependencies in the format of a requirements file.

`make image-pins` adds the versions in constraints.txt and the hashes of all files.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["completion"]]
    sys.stdout.writelines(f"{line}\n" for line in lines)
