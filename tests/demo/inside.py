"""The demo itself, which `tests.demo` starts in its sandbox: `python -m tests.demo.inside FOLDER`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.demo.cluster import DemoCluster
from tests.demo.screen import Screen
from tests.demo.steps import run

INTERRUPTED = 130


def main(folder: Path) -> int | str:
    """Run the demo with its files in `folder`; return its exit code or an error message."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    console = Console(highlight=False)
    try:
        with DemoCluster(folder) as cluster:
            passed = run(cluster, Screen(console))
    except KeyboardInterrupt:
        console.print("\nInterrupted. The demo has cleaned up.")
        return INTERRUPTED
    except (OSError, RuntimeError) as error:
        return f"demo: {error}"
    console.print()
    console.print("Done. The demo has cleaned up." if passed else "The demo failed: see FAILED above.")
    return 0 if passed else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the demo once. Further signals are ignored, so that they do not interrupt the cleanup."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
