"""Log lines as Kubernetes' components write them: klog's text, or JSON (`logging.format`).

Text is one line with klog's header, `Lmmdd hh:mm:ss.uuuuuu threadid file:line] msg`, as k8s.io/klog/v2 documents it at
the top of klog.go; like klog, it puts the process id where that says threadid, and uses local time. JSON has the keys
that k8s.io/component-base/logs/json sets up: `ts` (milliseconds since the epoch), `caller` (folder, file and line),
`msg`, then `v` (the verbosity) for all but errors, which have `err` instead if there is one. What it does not have is
`severity`, for warnings only: those cannot be told from other lines there.

Whatever a message holds, it cannot begin another line: what is not printable is escaped.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from kproxy.config.types import Logging, VModule
from kproxy.model.logging import V2

_SEVERITIES = {logging.CRITICAL: "F", logging.ERROR: "E", logging.WARNING: "W"}


def start_logging(settings: Logging) -> None:
    """Log to stderr as the settings say, and to nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    lowest = max((settings.verbosity, *(item.verbosity for item in settings.vmodule)))
    if lowest > settings.verbosity:
        handler.addFilter(FileVerbosity(settings.verbosity, settings.vmodule))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level_of(lowest))
    if lowest < 4:
        # Its warnings are about details of connections; what fails, kproxy logs itself.
        logging.getLogger("urllib3").setLevel(logging.ERROR)


def writes_json() -> bool:
    """Return whether log lines are JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def level_of(verbosity: int) -> int:
    """Return the lowest level that is logged with `--v` of this number."""
    if verbosity >= 4:
        return logging.DEBUG
    return V2 if verbosity >= 2 else logging.INFO


def verbosity_of(level: int) -> int:
    """Return the least `--v` with which messages of a level are logged."""
    if level >= logging.INFO:
        return 0
    return 2 if level >= V2 else 4


def printable(text: str) -> str:
    """Return text on one line: control characters, line separators and the like are escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class TextFormatter(logging.Formatter):
    """klog's lines. Each line of a traceback, which only `--v=4` shows, has the header of its message."""

    def __init__(self) -> None:
        super().__init__()
        self._second, self._time = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of one record."""
        severity = _SEVERITIES.get(record.levelno, "I")
        header = f"{severity}{self._when(record.created)} {record.process:>7} {record.filename}:{record.lineno}] "
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        return "\n".join(header + printable(line) for line in lines)

    def _when(self, seconds: float) -> str:
        microseconds = int(seconds * 1e6)
        second = microseconds // 1_000_000
        if second != self._second:
            # Two threads never format at once: a handler has a lock.
            self._time = time.strftime("%m%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._time}.{microseconds % 1_000_000:06}"


class JsonFormatter(logging.Formatter):
    """The lines of component-base; a traceback is in `stacktrace`, zap's usual name for one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of one record."""
        caller = "/".join(record.pathname.rsplit("/", 2)[-2:])
        fields: dict[str, object] = {
            "ts": record.created * 1000,
            "caller": f"{caller}:{record.lineno}",
            "msg": _encodable(record.getMessage()),
        }
        if record.levelno < logging.ERROR:
            fields["v"] = verbosity_of(record.levelno)
        if record.levelno == logging.WARNING:
            fields["severity"] = "warning"
        if record.exc_info and record.exc_info[1] is not None:
            fields["err"] = _encodable(repr(record.exc_info[1]))
            fields["stacktrace"] = _encodable(self.formatException(record.exc_info))
        return msgspec.json.encode(fields).decode()


class FileVerbosity:
    """Lets messages through that are within the verbosity of their source file (`logging.vmodule`).

    As in klog, patterns are compared with the file's name less its ending, the first that fits counts, and it can only
    add to what the verbosity of all files shows.
    """

    def __init__(self, verbosity: int, files: Iterable[VModule]) -> None:
        self._verbosity = verbosity
        self._files = tuple(files)
        self._levels: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record."""
        level = self._levels.get(record.module)
        if level is None:
            fitting = (item.verbosity for item in self._files if fnmatchcase(record.module, item.file_pattern))
            level = self._levels[record.module] = level_of(max(self._verbosity, next(fitting, 0)))
        return record.levelno >= level


def _encodable(text: str) -> str:
    """Return text that has an encoding in UTF-8: what programs print may be any bytes (PEP 383)."""
    return text.encode("utf-8", "backslashreplace").decode()
