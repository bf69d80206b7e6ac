"""Run the demo in a sandbox, so that it cannot change the machine: `python -m tests.demo`."""

from __future__ import annotations

import sys

from tests.demo.sandbox import enter


def main() -> str:
    """Replace this process with the demo. Returns only if that fails, with the reason."""
    return f"demo: {enter('tests.demo.inside')}"


if __name__ == "__main__":
    sys.exit(main())
