"""Reports are printed as text, JSON and YAML."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.cli.output import WIDTH, ExitCode, Style, fit, show_report, table, terminal_style, width
from kproxy.diagnose.report import API_VERSION, Report, ReportPart, document, schema
from tests.schemas import FOLDER, kinds, schema_text


class Wheel(ReportPart, frozen=True, kw_only=True):
    pressure_kpa: int


class Bicycle(Report, frozen=True, kw_only=True):
    frame_number: str
    wheels: tuple[Wheel, ...] = ()


BICYCLE = Bicycle(frame_number="ä1", wheels=(Wheel(pressure_kpa=400),))
DOCUMENT = {"apiVersion": API_VERSION, "kind": "Bicycle", "frameNumber": "ä1", "wheels": [{"pressureKpa": 400}]}


def test_documents_match_their_schema_and_nothing_else_does() -> None:
    validator = Draft202012Validator(schema(Bicycle))
    assert document(BICYCLE) == DOCUMENT
    assert validator.is_valid(DOCUMENT)
    for wrong in ({**DOCUMENT, "kind": "Car"}, {**DOCUMENT, "color": "red"}, {**DOCUMENT, "frameNumber": 1}):
        assert not validator.is_valid(wrong)


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(BICYCLE, "json", lambda _: ())
    assert json.loads(capsys.readouterr().out) == DOCUMENT
    show_report(BICYCLE, "yaml", lambda _: ())
    assert yaml.safe_load(capsys.readouterr().out) == DOCUMENT
    show_report(BICYCLE, "text", lambda style: [style.bad("flat"), "tire"])
    assert capsys.readouterr().out == "flat\ntire\n"


def test_colors_only_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not terminal_style().colored
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal_style().bad("flat") == "\x1b[1;31mflat\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal_style().bad("flat") == "flat"


def test_tables_align_colored_cells() -> None:
    style = Style(colored=True)
    lines = table([(style.good("ok"), "node-1", "fine"), ("broken", "n", "")], indent="  ")
    assert lines == [f"  {style.good('ok')}      node-1  fine", "  broken  n"]


def test_long_lines_are_wrapped_with_their_indentation() -> None:
    lines = fit("  x " + "word " * 40 + "n" * 150)
    assert all(width(line) <= WIDTH for line in lines)
    assert [line[:6] for line in lines] == ["  x wo", *["      "] * (len(lines) - 1)]
    assert "".join(lines).replace(" ", "") == "x" + "word" * 40 + "n" * 150
    assert fit("short") == ["short"]


def test_exit_codes() -> None:
    assert [*ExitCode] == [0, 1, 2, 3]


def test_committed_schemas_are_those_of_the_reports() -> None:
    expected = {f"{kind.__name__}.json": schema_text(kind) for kind in kinds()}
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert committed == expected, "run `python -m tests.schemas`"
    page = (FOLDER.parent / "output.md").read_text()
    assert {name for name in expected if f"schemas/{name}" not in page} == set()
