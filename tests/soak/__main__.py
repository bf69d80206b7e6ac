"""Run kproxy under random changes, faults and damages, with continuous connections of which none may fail.

Everything runs in temporary network namespaces. Needs root. A failure is printed with its seed; the same seed repeats
the same actions, although not to the millisecond.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.lab.requirements import missing_commands, missing_privilege
from tests.soak.run import MAX_SHOWN, Soak

MODES = ("iptables", "nftables")


def main() -> None:
    """Run the soak test. The exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of all runs together (default: 600)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=None, help="seed of the run to repeat")
    parser.add_argument("--variant", choices=("nft", "legacy"), default="nft", help="the iptables to use")
    options = parser.parse_args()
    if problem := missing_commands() or missing_privilege():
        sys.exit(problem)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    modes = MODES if options.mode == "both" else (options.mode,)
    failed = False
    for mode in modes:
        folder = Path(tempfile.mkdtemp(prefix=f"kproxy-soak-{mode}-"))
        print(f"{mode} mode: seed {seed}, logs in {folder}", flush=True)
        outcome = Soak(mode, options.seconds / len(modes), seed, folder, variant=options.variant).run()
        print(outcome.text)
        for problem in outcome.problems[:MAX_SHOWN]:
            print(f"PROBLEM {problem}")
        if outcome.problems:
            failed = True
            print(f"{len(outcome.problems)} problems; seed {seed}, logs in {folder}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
