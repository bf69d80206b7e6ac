"""The demo itself, run by `tests.demo` in a sandbox: `python -m tests.demo.inside FOLDER`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.demo.cluster import Scene
from tests.demo.screen import Screen
from tests.demo.steps import tell

INTERRUPTED = 130


def main(folder: Path) -> int | str:
    """Play the demo with its files in `folder`; return its exit code, or what went wrong."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    console = Console(highlight=False)
    try:
        with Scene(folder) as scene:
            good = tell(scene, Screen(console))
    except KeyboardInterrupt:
        console.print("\nInterrupted. Everything is removed.")
        return INTERRUPTED
    except (OSError, RuntimeError) as error:
        return f"demo: {error}"
    console.print()
    console.print("Everything is removed." if good else "Not as it should be: see WRONG above.")
    return 0 if good else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop the story, once: a second signal must not stop the clearing up."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
