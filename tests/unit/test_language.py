"""Words that the field does not use for what they mean here, each with what to write instead.

Reviewers extend the list: whoever finds a private word, or a phrase that has to be read twice, adds it here. It then
cannot come back.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INSTEAD = {
    r"\bin force\b": "active, effective, current",
    r"\b(?:rules?|table|state|services?) of before\b": "previous, existing",
    r"(?<!proxy-)\bmode (?:iptables|nftables|ipvs)\b": "iptables mode, nftables mode, ipvs mode",
    r"\bafter the cluster\b": "in sync with the cluster",
    r"\btaken in\b": "applied, received",
    r"\bis (?:told|said)\b|\bare (?:told|said)\b|\bto be (?:told|said)\b": "is notified, is reported, is logged",
    r"\bother hands\b": "another process",
    r"\b(?:is|are|was|were) not any more\b": "is no longer",
    r"\bany longer\b": "no longer",
    r"\bby which .* knows? us\b": "authentication headers",
    r"\bcannot be had\b": "cannot be obtained, is not available",
    r"\bmay well\b": "may",
    r"\bas many .* as they should\b": "the expected number of",
    r"\banew\b": "again, from scratch",
    r"\bthere (?:is|are) no .* any more\b": "no longer exists",
    r"\bfrom now on\b.*\bfrom now on\b": "(say it once)",
    r"\bslept through\b": "fixed sleeps",
    r"\ball there is\b": "everything, the complete ...",
    r"\bwhat there is\b": "the current ..., existing ...",
    r"\bfor good reason\b": "(say the reason)",
    r"\bhand(?:s|ed)? on\b": "pass, deliver, emit",
    r"\bleft out\b": "skipped, ignored, omitted",
    r"\blet(?:s)? in\b": "accept",
    r"\bbrings? .* after\b": "reconciles, syncs",
    r"\bhas not got\b|\bhas it not\b|\bkproxy has not\b": "does not have, does not implement",
    r"\bmore rarely\b": "less often",
    r"\bdone without\b": "ignored, optional",
    r"\bof its own accord\b": "by itself",
    r"\bgoes? by\b": "uses, is identified by",
    r"\bgets? to know\b": "learns, reads",
    r"\bmakes? up for\b": "compensates",
    r"\bput in its place\b": "replace",
    r"\btakes? the place of\b": "replaces",
    r"\bas many \w+ as they should\b|\bnot as many \w+ as\b": "the expected number of",
    r"\bhas a floor\b": "has a minimum, a baseline cost",
    r"\bwithout end\b": "continuous, endless",
    r"\bof those wanted\b|\bis what is wanted\b": "desired, expected, about to be added",
    r"\bit is remembered\b": "is tracked, is stored",
    r"'s lack\b": "is missing",
    r"\bby none\b": "for no ..., neither ... nor ...",
    r"\btakes? some \w+": "picks an arbitrary ...",
    r"\bwhose matter\b": "features",
    r"\bwhat is its\b|\bwhat was its\b": "(name the thing)",
    r"expected `(?:int|str|bool|array|object)`": 'must be an integer, not "http"',
    r"\bbehaviour|\bhonour|\bmisspelt\b|\bneighbour|\blabelled\b|recognis|organis": "American spelling",
}
"""Patterns (case is ignored), each with what to write instead."""

PROSE = ("*.py", "*.md", "*.yaml", "*.yml", "*.sh", "*.json", "*.svg", "Makefile", "Dockerfile", ".ci/run")
EXEMPT = (
    "tests/unit/test_language.py",
    "tests/unit/test_quoted_messages.py",  # quotes messages of earlier versions
    "tests/golden/",  # recordings of kube-proxy
    "tests/bench/history/",  # results of earlier versions
    "tests/watch/",  # recordings of an API server
)


def prose_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "--", *PROSE], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if not name.startswith(EXEMPT)]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize(("pattern", "instead"), INSTEAD.items(), ids=INSTEAD.keys())
def test_words_that_the_field_does_not_use(pattern: str, instead: str) -> None:
    word = re.compile(pattern, re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in prose_files()
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if word.search(line)
    ]
    assert found == [], f"write instead: {instead}"
