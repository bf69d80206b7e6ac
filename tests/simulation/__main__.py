"""Replay one history, or many: `python -m tests.simulation SEED --verbose`, `--start 1 --count 100000`.

The order of Python's sets also decides what happens, so that a history is equal only for equal values of the
environment variable PYTHONHASHSEED. The default is 0, as in `make test`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter

from tests.simulation.history import ViolationError, World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="the history to replay")
    parser.add_argument("--verbose", action="store_true", help="print the history")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=10_000, help="how many seeds to try")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.count) if options.seed is None else [options.seed]
    counts: Counter[str] = Counter()
    failed = 0
    began = time.process_time()
    for seed in seeds:
        world = World(seed, show=print if options.verbose else None)
        try:
            world.run()
        except Exception as error:  # noqa: BLE001 - reported, with the seed
            failed += 1
            if not isinstance(error, ViolationError):
                traceback.print_exc()
            print(f"seed {seed}: {str(error)[:4000]}", flush=True)  # noqa: T201
            if not options.keep_going:
                break
        counts += world.counts
    seconds = time.process_time() - began
    print(f"{failed} failed; {seconds:.1f} s of CPU time; {dict(counts)}")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    if "PYTHONHASHSEED" not in os.environ:
        # Python reads the variable only when it starts.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
