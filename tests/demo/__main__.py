"""Start the demo where it can change nothing of the machine: run as `python -m tests.demo`."""

from __future__ import annotations

import sys

from tests.demo.sandbox import enter


def main() -> str:
    """Replace this process by the demo's; return only, with the reason, if that cannot be done."""
    return f"demo: {enter('tests.demo.inside')}"


if __name__ == "__main__":
    sys.exit(main())
