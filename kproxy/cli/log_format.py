"""Log lines in klog's text format or in Kubernetes' JSON format, with verbosity per source file.

Text: each line begins with klog's header, `Lmmdd hh:mm:ss.uuuuuu threadid file:line] msg`, which the comment at the top
of klog.go in k8s.io/klog/v2 describes. As in klog, `threadid` is actually the process ID, and times are local times.

JSON: each line is an object with the keys of k8s.io/component-base/logs/json: `ts` (milliseconds since the epoch),
`caller` (directory, file and line), `msg`, and, except for errors, `v` (the verbosity). Records with an exception also
have `err` and `stacktrace`. Warnings also have `severity`, a key that kproxy adds. Without it, warnings would look like
informational lines.

Both formats escape all non-printable characters, so that no message can forge another log line or control a terminal.
Messages are cut to a maximum length, except debug messages.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from kproxy.config.types import Logging, VModule
from kproxy.model.log_throttle import V2
from kproxy.model.printable_text import MAX_LENGTH, printable

KEPT_LINES = 500
"""How many lines of the log a running daemon keeps for `kproxy bundle`, about 100 kB."""
_SEVERITIES = {logging.CRITICAL: "F", logging.ERROR: "E", logging.WARNING: "W"}


def start_logging(settings: Logging) -> None:
    """Send all log output to stderr, in the configured format and verbosity."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    highest = settings.verbosity
    if settings.vmodule:
        files = FileVerbosity(settings.verbosity, settings.vmodule)
        highest = files.highest
        handler.addFilter(files)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level_of(highest))
    if highest < 4:
        # Do not log urllib3's warnings, which are about details of connections. kproxy logs failed requests itself.
        logging.getLogger("urllib3").setLevel(logging.ERROR)


class RecentLines(logging.Handler):
    """Keeps the latest lines of the log (implements `kproxy.app.control.DaemonLog`)."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(TextFormatter())
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the lines of one record."""
        try:
            self._lines.append(self.format(record))
        except Exception:  # noqa: BLE001 - as in the handlers of the standard library
            self.handleError(record)

    def lines(self) -> list[str]:
        """Return the latest lines, oldest first."""
        return list(self._lines)

    @staticmethod
    def set_verbosity(verbosity: int) -> None:
        """Change the general verbosity. Files that `logging.vmodule` names keep theirs if it is higher."""
        root = logging.getLogger()
        highest = verbosity
        for handler in root.handlers:
            for each in handler.filters:
                if isinstance(each, FileVerbosity):
                    each.verbosity = verbosity
                    highest = each.highest
        root.setLevel(level_of(highest))


def keep_recent_lines() -> RecentLines:
    """Also keep the log's latest lines from now on. The filters are those of the other handlers."""
    recent = RecentLines()
    root = logging.getLogger()
    for handler in root.handlers:
        for each in handler.filters:
            recent.addFilter(each)
    root.addHandler(recent)
    return recent


def writes_json() -> bool:
    """Return whether the log format is JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def level_of(verbosity: int) -> int:
    """Return the lowest level of the `logging` module that is logged with `--v=verbosity`."""
    if verbosity >= 4:
        return logging.DEBUG
    return V2 if verbosity >= 2 else logging.INFO


def verbosity_of(level: int) -> int:
    """Return the lowest value of `--v` at which messages of this level of the `logging` module are logged."""
    if level >= logging.INFO:
        return 0
    return 2 if level >= V2 else 4


class TextFormatter(logging.Formatter):
    """klog's text format. Each line of a traceback (logged with `--v=4`) gets the same header as the message."""

    def __init__(self) -> None:
        super().__init__()
        self._second, self._time = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        severity = _SEVERITIES.get(record.levelno, "I")
        header = f"{severity}{self._when(record.created)} {record.process:>7} {record.filename}:{record.lineno}] "
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        return "\n".join(header + printable(line, _limit(record)) for line in lines)

    def _when(self, seconds: float) -> str:
        microseconds = int(seconds * 1e6)
        second = microseconds // 1_000_000
        if second != self._second:
            # This needs no lock, because the handler formats one record at a time.
            self._time = time.strftime("%m%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._time}.{microseconds % 1_000_000:06}"


class JsonFormatter(logging.Formatter):
    """The JSON format of component-base. The key of a traceback is `stacktrace`, as in zap."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        caller = "/".join(record.pathname.rsplit("/", 2)[-2:])
        fields: dict[str, object] = {
            "ts": record.created * 1000,
            "caller": f"{caller}:{record.lineno}",
            "msg": printable(record.getMessage(), _limit(record)),
        }
        if record.levelno < logging.ERROR:
            fields["v"] = verbosity_of(record.levelno)
        if record.levelno == logging.WARNING:
            fields["severity"] = "warning"
        if record.exc_info and record.exc_info[1] is not None:
            fields["err"] = printable(repr(record.exc_info[1]), _limit(record))
            fields["stacktrace"] = "\n".join(map(printable, self.formatException(record.exc_info).splitlines()))
        return msgspec.json.encode(fields).decode()


class FileVerbosity:
    """A logging filter for `logging.vmodule`: verbosity per source file.

    As in klog, patterns are matched against the file name without its extension, and the first pattern that matches
    applies. It can only raise the verbosity of a file above the general `verbosity`, not lower it.
    """

    def __init__(self, verbosity: int, files: Iterable[VModule]) -> None:
        self.verbosity = verbosity
        self._files = tuple(files)
        self._levels: dict[str, int] = {}

    @property
    def highest(self) -> int:
        """The verbosity of the file that logs most."""
        return max((self.verbosity, *(item.verbosity for item in self._files)))

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record."""
        level = self._levels.get(record.module)
        if level is None:
            matches = (item.verbosity for item in self._files if fnmatchcase(record.module, item.file_pattern))
            level = self._levels[record.module] = level_of(next(matches, 0))
        return record.levelno >= min(level, level_of(self.verbosity))


def _limit(record: logging.LogRecord) -> int:
    """Return the maximum length of a record's message, or 0 if it is not limited."""
    return MAX_LENGTH if record.levelno >= logging.INFO else 0
