"""`kproxy explain` names the one reason why a Service does not work, and says when it works."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.cli.explain import gather
from kproxy.cli.explain_text import explanation_lines
from kproxy.cli.output import WIDTH, Style, width
from kproxy.cli.parser import parse
from kproxy.config import configure
from kproxy.diagnose.explain import explain
from kproxy.diagnose.explain_report import ReasonCode, ServiceExplanation
from kproxy.diagnose.report import document, schema
from tests.unit.explain_cases import BROKEN, SOUND, SetUp

MODES = ("iptables", "nftables")
VALIDATOR = Draft202012Validator(schema(ServiceExplanation))


def explained(setup: SetUp, folder: Path, mode: str = "iptables") -> ServiceExplanation:
    """Explain a set-up as the command does."""
    path = folder / "all.yaml"
    path.write_text(setup.yaml)
    flags = [f"--objects={path}", "--hostname-override=node-1", f"--proxy-mode={mode}", *setup.flags]
    options = parse(["explain", setup.key, *flags])
    return explain(gather(options, configure(options)[0], setup.key), setup.client)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setup", [*BROKEN, *SOUND], ids=lambda setup: setup.name)
def test_verdict_and_reason(setup: SetUp, mode: str, tmp_path: Path) -> None:
    report = explained(setup, tmp_path, mode)
    assert (report.verdict, report.reason.code if report.reason else None) == (setup.verdict, setup.code)
    if report.reason is not None:
        assert setup.text in " ".join((report.reason.message, *report.reason.details, report.reason.fix))
        assert report.reason.fix


@pytest.mark.parametrize("setup", BROKEN, ids=lambda setup: setup.name)
def test_consequences_are_no_reasons(setup: SetUp, tmp_path: Path) -> None:
    """All ports name the same reason or work, and remarks do not repeat it."""
    report = explained(setup, tmp_path)
    assert {port.reason for port in report.ports} <= {None, report.reason}
    assert report.reason is None or report.reason.code not in {note.code for note in report.notes}


@pytest.mark.parametrize("setup", SOUND, ids=lambda setup: setup.name)
def test_notes_of_sound_services(setup: SetUp, tmp_path: Path) -> None:
    assert {note.code for note in explained(setup, tmp_path).notes} == setup.notes


@pytest.mark.parametrize("setup", [*BROKEN, *SOUND], ids=lambda setup: setup.name)
def test_output(setup: SetUp, tmp_path: Path) -> None:
    report = explained(setup, tmp_path)
    VALIDATOR.validate(document(report))
    lines = list(explanation_lines(report, Style()))
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].endswith(report.verdict)
    assert [width(line) for line in explanation_lines(report, Style(colored=True))] == list(map(len, lines))


def test_every_reason_has_a_set_up() -> None:
    elsewhere = {"Quarantined", "NotSyncedYet", "Drifted", "StaleConntrack"}
    assert {setup.code for setup in BROKEN} == set(get_args(ReasonCode)) - elsewhere
