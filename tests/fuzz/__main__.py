"""`python -m tests.fuzz`: run all fuzz targets in turn for some time, or one input."""

from __future__ import annotations

import argparse
import resource
import sys
import time

from tests.fuzz.runner import BrokenParserError, run_corpus, run_input, run_mutations
from tests.fuzz.targets import TARGETS

INPUTS_PER_TURN = 200
MEMORY_LIMIT = 2 << 30
"""Maximum size of the address space in bytes: a parser that uses more fails with a `MemoryError`."""


def main() -> int:
    """Return the exit code: 1 if an input breaks a parser."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first turn (default: random)")
    parser.add_argument("--target", choices=sorted(TARGETS), help="run only this target")
    parser.add_argument("--hex", help="run only this input of the target")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    targets = [TARGETS[options.target]] if options.target else list(TARGETS.values())
    try:
        if options.hex is not None:
            run_input(targets[0], bytes.fromhex(options.hex))
            return 0
        seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000_000
        _write(f"seed {seed}, {len(targets)} targets, {options.seconds:g} s")
        for target in targets:
            run_corpus(target)
        inputs, end = 0, time.monotonic() + options.seconds
        while time.monotonic() < end:
            for target in targets:
                run_mutations(target, seed, INPUTS_PER_TURN)
                inputs += INPUTS_PER_TURN
            seed += 1
        _write(f"{inputs:,} inputs, the last seed was {seed - 1}; no parser broke")
    except BrokenParserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
