"""Log lines in the text format of klog and the JSON format of component-base, and the levels that are logged."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kproxy.cli.log_format import (
    JsonFormatter,
    TextFormatter,
    keep_recent_lines,
    level_of,
    start_logging,
    verbosity_of,
    writes_json,
)
from kproxy.config.types import Logging, VModule
from kproxy.model.log_throttle import V2
from kproxy.model.printable_text import MAX_LENGTH, printable

HERE = Path(__file__)
CREATED = time.mktime((2025, 3, 9, 7, 5, 2, 0, 0, -1)) + 0.000123
UNPRINTABLE = "a\nW0101 forged\rb\x1b[31m\x00\x7f\x85\u2028\u202e\udcff\tc"

ESCAPED = r"a\nW0101 forged\rb\x1b[31m\x00\x7f\x85\u2028\u202e\udcff\tc"


def record(level: int, message: str = "started", *arguments: object, seconds: float = CREATED) -> logging.LogRecord:
    path = "/opt/kproxy/sync/family_sync.py"
    log_record = logging.LogRecord("kproxy.sync.family_sync", level, path, 42, message, arguments, None)
    log_record.created, log_record.process = seconds, 12345
    return log_record


def failed(level: int) -> logging.LogRecord:
    log_record = record(level, "it failed")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log_record.exc_info = sys.exc_info()
    return log_record


# Text


@pytest.mark.parametrize(
    ("level", "letter"),
    [(logging.DEBUG, "I"), (V2, "I"), (logging.INFO, "I"), (logging.WARNING, "W"), (logging.ERROR, "E"), (50, "F")],
)
def test_text_has_the_format_of_klog(level: int, letter: str) -> None:
    line = TextFormatter().format(record(level, "%s: %d services", "IPv4", 3))
    assert line == f"{letter}0309 07:05:02.000123   12345 family_sync.py:42] IPv4: 3 services"


def test_timestamps_advance() -> None:
    text = TextFormatter()
    created = (CREATED, CREATED + 0.5, CREATED + 1, CREATED + 60)
    times = [text.format(record(logging.INFO, seconds=seconds)).split()[1] for seconds in created]
    assert times == ["07:05:02.000123", "07:05:02.500123", "07:05:03.000123", "07:06:02.000123"]


def test_long_process_id_is_not_truncated() -> None:
    log_record = record(logging.INFO)
    log_record.process = 123456789
    assert " 123456789 family_sync.py:42] " in TextFormatter().format(log_record)


def test_control_characters_of_messages_are_escaped() -> None:
    line = TextFormatter().format(record(logging.INFO, "object %s", UNPRINTABLE))
    assert line.partition("] ")[2] == f"object {ESCAPED}"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_long_messages_are_cut_unless_they_are_debug_messages(formatter: logging.Formatter) -> None:
    name = "n" * 10_000
    line = formatter.format(record(logging.WARNING, "object %s", name))
    assert len(line) < MAX_LENGTH + 200
    assert "n... (5,911 more characters)" in line
    assert name in formatter.format(record(logging.DEBUG, "object %s", name))


@pytest.mark.parametrize("character", ["\x1b", "\u202e", "\U000e0001"])
def test_messages_are_not_longer_because_of_escape_sequences(character: str) -> None:
    for count in (MAX_LENGTH // 10, MAX_LENGTH, 10 * MAX_LENGTH):
        line = printable("n" + count * character, MAX_LENGTH)
        escaped, _, suffix = line.partition("... (")
        kept = len(escaped) - len("n")
        size = len(printable(character))
        assert len(escaped) <= MAX_LENGTH
        assert kept % size == 0  # no escape sequence is cut off
        if kept == count * size:
            assert not suffix
        else:
            assert len(escaped) + size > MAX_LENGTH
            assert suffix == f"{count - kept // size:,} more characters)"


def test_printable_characters_are_not_escaped() -> None:
    assert printable("Größe 5 µs … 'a\\b' 中") == "Größe 5 µs … 'a\\b' 中"


def test_every_line_of_a_traceback_has_a_header() -> None:
    lines = TextFormatter().format(failed(logging.DEBUG)).split("\n")
    header = "I0309 07:05:02.000123   12345 family_sync.py:42] "
    assert [line for line in lines if not line.startswith(header)] == []
    messages = [line.removeprefix(header) for line in lines]
    assert messages[:2] == ["it failed", "Traceback (most recent call last):"]
    assert messages[-2:] == ["ValueError: two", "lines"]


# JSON


@pytest.mark.parametrize(("level", "verbosity"), [(logging.DEBUG, 4), (V2, 2), (logging.INFO, 0)])
def test_json_has_the_format_of_component_base(level: int, verbosity: int) -> None:
    line = JsonFormatter().format(record(level, "%s: %d services", "IPv4", 3))
    assert json.loads(line) == {
        "ts": pytest.approx(CREATED * 1000, abs=1e-3),
        "caller": "sync/family_sync.py:42",
        "msg": "IPv4: 3 services",
        "v": verbosity,
    }
    assert list(json.loads(line)) == ["ts", "caller", "msg", "v"]
    assert isinstance(json.loads(line)["ts"], float)


def test_warnings_have_a_severity_in_json() -> None:
    fields = json.loads(JsonFormatter().format(record(logging.WARNING)))
    assert (fields["v"], fields["severity"]) == (0, "warning")


def test_errors_have_no_verbosity_in_json() -> None:
    fields = json.loads(JsonFormatter().format(record(logging.ERROR)))
    assert list(fields) == ["ts", "caller", "msg"]


def test_exception_is_in_separate_fields_of_json() -> None:
    fields = json.loads(JsonFormatter().format(failed(logging.DEBUG)))
    assert (fields["msg"], fields["err"], fields["v"]) == ("it failed", "ValueError('two\\nlines')", 4)
    assert fields["stacktrace"].startswith("Traceback (most recent call last):\n")
    assert fields["stacktrace"].endswith("ValueError: two\nlines")


def test_json_record_is_always_one_line() -> None:
    line = JsonFormatter().format(record(logging.INFO, "object %s", UNPRINTABLE))
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["msg"] == "object " + ESCAPED
    assert line.isprintable()


# Levels


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def log_each_level() -> None:
    for level in (logging.DEBUG, V2, logging.INFO, logging.WARNING):
        logging.getLogger("kproxy.somewhere").log(level, "%d", level)


def shown(capfd: pytest.CaptureFixture[str], settings: Logging) -> list[str]:
    """Log one message of each of the levels 10, 15, 20 and 30; return the messages that are written."""
    start_logging(settings)
    log_each_level()
    lines = capfd.readouterr().err.splitlines()
    if settings.format == "json":
        assert all(json.loads(line)["caller"].startswith("unit/test_logs.py:") for line in lines)
        return [json.loads(line)["msg"] for line in lines]
    assert all(f" {os.getpid():>7} test_logs.py:" in line for line in lines)
    return [line.partition("] ")[2] for line in lines]


@pytest.mark.parametrize("kind", ["text", "json"])
@pytest.mark.parametrize(
    ("verbosity", "messages"),
    [
        (0, ["20", "30"]),
        (1, ["20", "30"]),
        (2, ["15", "20", "30"]),
        (3, ["15", "20", "30"]),
        (4, ["10", "15", "20", "30"]),
        (10, ["10", "15", "20", "30"]),
    ],
)
def test_verbosity_enables_levels(
    root: logging.Logger, capfd: pytest.CaptureFixture[str], kind: str, verbosity: int, messages: list[str]
) -> None:
    settings = Logging(format="json" if kind == "json" else "text", verbosity=verbosity)
    assert shown(capfd, settings) == messages
    assert writes_json() == (kind == "json")
    assert level_of(verbosity) == int(messages[0])


def test_level_is_enabled_from_its_verbosity_on() -> None:
    for level in (logging.DEBUG, V2, logging.INFO, logging.WARNING):
        assert level_of(verbosity_of(level)) <= level
        assert verbosity_of(level) == 0 or level_of(verbosity_of(level) - 1) > level


@pytest.mark.parametrize(
    ("patterns", "verbosity", "messages"),
    [
        ([("test_logs", 4)], 0, ["10", "15", "20", "30"]),
        ([("test_*", 2)], 0, ["15", "20", "30"]),
        ([("test_log", 4)], 0, ["20", "30"]),
        ([("test_logs.py", 4)], 0, ["20", "30"]),
        ([("test_*", 2), ("test_logs", 4)], 0, ["15", "20", "30"]),
        ([("test_logs", 0), ("other", 4)], 2, ["15", "20", "30"]),
    ],
)
def test_vmodule_sets_the_verbosity_of_single_files(
    root: logging.Logger,
    capfd: pytest.CaptureFixture[str],
    patterns: list[tuple[str, int]],
    verbosity: int,
    messages: list[str],
) -> None:
    files = tuple(VModule(file_pattern=pattern, verbosity=number) for pattern, number in patterns)
    assert shown(capfd, Logging(verbosity=verbosity, vmodule=files)) == messages


@pytest.mark.parametrize(
    ("started", "changed", "messages"),
    [
        (0, 0, ["15", "20", "30"]),
        (0, 4, ["10", "15", "20", "30"]),
        (4, 0, ["15", "20", "30"]),
        (4, 2, ["15", "20", "30"]),
    ],
)
def test_the_higher_of_vmodule_and_a_changed_verbosity_applies(
    root: logging.Logger, capfd: pytest.CaptureFixture[str], started: int, changed: int, messages: list[str]
) -> None:
    start_logging(Logging(verbosity=started, vmodule=(VModule(file_pattern="test_logs", verbosity=2),)))
    recent = keep_recent_lines()
    recent.set_verbosity(4)
    recent.set_verbosity(changed)
    log_each_level()
    assert root.isEnabledFor(V2)
    root.handle(record(V2, "of another file"))
    shown_lines = capfd.readouterr().err.splitlines()
    expected = [*messages, *(["of another file"] if changed >= 2 else [])]
    assert [line.partition("] ")[2] for line in shown_lines] == expected
    assert [line.partition("] ")[2] for line in recent.lines()] == expected


def test_restarted_logging_has_only_the_new_settings(root: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd, Logging(verbosity=4, vmodule=(VModule(file_pattern="x", verbosity=5),)))
    assert shown(capfd, Logging()) == ["20", "30"]
