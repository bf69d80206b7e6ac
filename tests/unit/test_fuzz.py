"""The fuzz targets: their corpora and a short run with a fixed seed. `make fuzz` runs them for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.runner import BrokenParserError, run_corpus, run_input, run_mutations
from tests.fuzz.targets import CORPUS, TARGETS, Target

INPUTS = 150


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_input_breaks_a_parser(name: str) -> None:
    run_corpus(TARGETS[name])
    run_mutations(TARGETS[name], 1, INPUTS)


def test_every_corpus_has_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def test_failure_names_the_input_and_the_command_that_repeats_it() -> None:
    def fail(data: bytes) -> None:
        raise KeyError(len(data))

    with pytest.raises(BrokenParserError) as caught:
        run_input(Target("proc", fail), b"\0a")
    assert str(caught.value).splitlines() == [
        "proc: KeyError: 2",
        "input: b'\\x00a'",
        "run it again: python -m tests.fuzz --target=proc --hex=0061",
    ]


def test_runs_with_the_same_seed_are_equal() -> None:
    seen: list[list[bytes]] = []
    for seed in (7, 7, 8):
        inputs: list[bytes] = []
        run_mutations(Target("manifests", inputs.append), seed, 20)
        seen.append(inputs)
    assert seen[0] == seen[1] != seen[2]
