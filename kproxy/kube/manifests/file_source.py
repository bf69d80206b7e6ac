"""Load objects from files, either once or whenever the files change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from kproxy.documents.document import FileProblem
from kproxy.documents.watch import PathSnapshot, PathWatcher, read_path
from kproxy.kube.manifests.parse import ManifestFile, combine, parse_file
from kproxy.model.delta import Delta, Replace

RELOAD_PERIOD = 2.0
"""Seconds between reads of the files if inotify is not available."""
log = logging.getLogger(__name__)


class FileSourceError(Exception):
    """Files cannot be used. The message has one line for each of the `problems`."""

    def __init__(self, problems: tuple[FileProblem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class ManifestUpdate(Struct, frozen=True):
    """The result of a snapshot: the objects to deliver, and lines for the log.

    `replacements` is () if the objects have not changed or must not be delivered.
    """

    replacements: tuple[Replace, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()


class ManifestState:
    """Computes the objects to deliver from snapshots of the files. Pure.

    Snapshots must be passed in the order in which they were read.

    Nothing is delivered until all files are valid for the first time. Delivering earlier, without the objects of the
    invalid files, would delete the rules that a previous process programmed for these objects. After the first
    delivery, if a file becomes invalid, its last valid content is used, and a new file that is invalid is ignored. If
    no file is usable, the objects stay as they are. To delete all objects, use a file with `items: []`.

    A file in which only some objects are invalid is used, so that one invalid Service does not hold up the others. The
    last valid state of an invalid object stays in use.
    """

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._parsed: dict[str, ManifestFile] = {}
        self._valid: dict[str, ManifestFile] = {}
        self._delivered: tuple[Replace, ...] = ()

    def update(self, snapshot: PathSnapshot) -> ManifestUpdate:
        """Process a snapshot and return its result."""
        if snapshot.problem is not None:
            return ManifestUpdate(problems=(snapshot.problem,))
        texts = {path: text for path, text in snapshot.files.items() if isinstance(text, bytes)}
        self._parsed = {
            path: self._parsed[path] if self._texts.get(path) == text else parse_file(path, text)
            for path, text in texts.items()
        }
        self._texts = texts
        problems = [text for text in snapshot.files.values() if isinstance(text, FileProblem)]
        problems += (problem for content in self._parsed.values() for problem in content.problems)
        invalid = [problem for content in self._parsed.values() for _, problem in content.invalid]
        self._valid = dict(self._last_valid(snapshot.files)) or self._valid
        loaded = combine(self._valid.values())
        changed = loaded.replacements != self._delivered and (bool(self._delivered) or not problems)
        if changed:
            self._delivered = loaded.replacements
        return ManifestUpdate(
            loaded.replacements if changed else (), loaded.notes, loaded.warnings, (*problems, *invalid)
        )

    def _last_valid(self, files: Mapping[str, bytes | FileProblem]) -> Iterator[tuple[str, ManifestFile]]:
        for path in files:
            content = self._parsed.get(path)
            if content is not None and not content.problems:
                yield path, content
            elif path in self._valid:
                yield path, self._valid[path]


class FileSource:
    """Loads the objects of `path`, a file or a directory (see `read_path`), and passes them to `sink`.

    Each call of `sink` passes four `Replace` deltas: one each for Services, EndpointSlices, Nodes and ServiceCIDRs, in
    this order. The delta for a kind without objects is empty. `load_once` calls `sink` in the calling thread. After
    `start`, a separate thread calls it. `sink` must not block.
    """

    def __init__(self, path: str, sink: Callable[[tuple[Delta, ...]], None]) -> None:
        self._path = path
        self._sink = sink
        self._state = ManifestState()
        self._last_lines: frozenset[str] = frozenset()
        self._has_problems = False
        self._problem = ""
        self._pending: tuple[Replace, ...] = ()
        self._watcher = PathWatcher(path, self._handle_snapshot, name="file-source", poll_period=RELOAD_PERIOD)

    def load_once(self) -> None:
        """Read the files and deliver their objects in the calling thread.

        Raises `FileSourceError` and delivers nothing if a file is invalid or no file exists.
        """
        update = self._state.update(read_path(self._path))
        if update.problems:
            raise FileSourceError(update.problems)
        self._log(update)
        self._pending = update.replacements
        self._deliver()

    def start(self) -> None:
        """Start the thread that watches the files."""
        self._watcher.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread. Waits at most `timeout` seconds for a running call of `sink`; no further call starts."""
        self._watcher.stop(timeout)

    def ages(self) -> dict[str, float]:
        """Return nothing: files have no connection that can become stale."""
        return {}

    def status(self) -> dict[str, object]:
        """Return `objectsProblem`, why a file cannot be used at the moment, or nothing if all files are valid."""
        return {"objectsProblem": self._problem} if self._problem else {}

    def _handle_snapshot(self, snapshot: PathSnapshot) -> bool:
        update = self._state.update(snapshot)
        self._problem = str(update.problems[0]) if update.problems else ""
        self._pending = update.replacements or self._pending
        self._log(update)
        if not self._watcher.stopping:
            self._deliver()
        return True

    def _deliver(self) -> None:
        if self._pending:
            self._sink(self._pending)
            self._pending = ()  # only now: if `sink` fails, the watcher tries again

    def _log(self, update: ManifestUpdate) -> None:
        """Log the lines that were not part of the previous update. Also log when all files have become valid again."""
        lines = [(logging.ERROR, str(problem)) for problem in update.problems]
        lines += ((logging.WARNING, warning) for warning in update.warnings)
        lines += ((logging.INFO, note) for note in update.notes)
        for level, line in lines:
            if line not in self._last_lines:
                log.log(level, "%s", line)
        if self._has_problems and not update.problems:
            log.info("%s: all object files are valid", self._path)
        self._has_problems = bool(update.problems)
        self._last_lines = frozenset(line for _, line in lines)
