"""The cluster's objects from files: read once, or followed as they change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from kproxy.documents.document import FileProblem
from kproxy.documents.watch import PathSnapshot, PathWatcher, read_path
from kproxy.kube.manifests.parse import ManifestFile, combine, parse_file
from kproxy.model.delta import Delta, Replace

RELOAD_PERIOD = 2.0
"""Seconds between readings where the kernel gives no notices of changes."""
STOP_TIMEOUT = 5.0
"""Seconds that `FileSource.stop` waits for a `sink` that blocks."""
log = logging.getLogger(__name__)


class FileSourceError(Exception):
    """Files that cannot be used; the message has a line for each of the `problems`."""

    def __init__(self, problems: tuple[FileProblem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class ManifestUpdate(Struct, frozen=True):
    """What a reading leads to: the objects to hand on (none if they are as before), and what is wrong."""

    replacements: tuple[Replace, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()


class ManifestState:
    """Decides what changed files mean. Pure: it is given readings, in the order in which they were made.

    Nothing is handed on before all files are good once: what an earlier run programmed would be deleted.
    Later a broken file counts as it last was while good; a new one counts as absent. Without any file that
    can be used everything stays as it was: a file that says `items: []` is the way to have no objects.
    """

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._parsed: dict[str, ManifestFile] = {}
        self._good: dict[str, ManifestFile] = {}
        self._handed_on: tuple[Replace, ...] = ()

    def take(self, reading: PathSnapshot) -> ManifestUpdate:
        """Return what to do about a reading."""
        if reading.trouble is not None:
            return ManifestUpdate(problems=(reading.trouble,))
        texts = {path: text for path, text in reading.files.items() if isinstance(text, bytes)}
        self._parsed = {
            path: self._parsed[path] if self._texts.get(path) == text else parse_file(path, text)
            for path, text in texts.items()
        }
        self._texts = texts
        problems = [text for text in reading.files.values() if isinstance(text, FileProblem)]
        problems += (problem for content in self._parsed.values() for problem in content.problems)
        self._good = dict(self._in_force(reading.files)) or self._good
        loaded = combine(self._good.values())
        changed = loaded.replacements != self._handed_on and (bool(self._handed_on) or not problems)
        if changed:
            self._handed_on = loaded.replacements
        return ManifestUpdate(loaded.replacements if changed else (), loaded.notes, loaded.warnings, tuple(problems))

    def _in_force(self, files: Mapping[str, bytes | FileProblem]) -> Iterator[tuple[str, ManifestFile]]:
        for path in files:
            content = self._parsed.get(path)
            if content is not None and not content.problems:
                yield path, content
            elif path in self._good:
                yield path, self._good[path]


class FileSource:
    """Hands the objects of `path`, a file or a folder (see `read_path`), to `sink`.

    Each time it calls `sink` once, with a `Replace` of Services, of EndpointSlices, of Nodes and of ServiceCIDRs, in
    this order, empty where there are none. `sink` is called from a thread and must not block.
    """

    def __init__(self, path: str, sink: Callable[[tuple[Delta, ...]], None]) -> None:
        self._path = path
        self._sink = sink
        self._following = ManifestState()
        self._said: frozenset[str] = frozenset()
        self._in_trouble = False
        self._follower = PathWatcher(
            path, self._take, name="file-source", poll_period=RELOAD_PERIOD, stop_timeout=STOP_TIMEOUT
        )

    def load_once(self) -> None:
        """Read the files and hand their objects on, in the calling thread.

        Raises `FileSourceError`, and hands nothing on, if a file cannot be used or there is none.
        """
        update = self._following.take(read_path(self._path))
        if update.problems:
            raise FileSourceError(update.problems)
        self._report(update)
        self._hand_on(update)

    def start(self) -> None:
        """Start the thread that follows the files. It is a daemon: a process may end without `stop`."""
        self._follower.start()

    def stop(self) -> None:
        """End the thread. `sink` is not called any more afterwards, unless it blocks."""
        self._follower.stop()

    def _take(self, reading: PathSnapshot) -> bool:
        try:
            self._take_in(reading)
        except Exception as error:  # a bug must not make us deaf to the next change
            log.error("%s: cannot be used: unexpected %r", self._path, error)
            log.debug("where it happened", exc_info=error)
        return True

    def _take_in(self, reading: PathSnapshot) -> None:
        update = self._following.take(reading)
        self._report(update)
        if not self._follower.stopping:
            self._hand_on(update)

    def _hand_on(self, update: ManifestUpdate) -> None:
        if update.replacements:
            self._sink(update.replacements)

    def _report(self, update: ManifestUpdate) -> None:
        """Log what was not true of the reading before."""
        lines = [(logging.ERROR, str(problem)) for problem in update.problems]
        lines += ((logging.WARNING, warning) for warning in update.warnings)
        lines += ((logging.INFO, note) for note in update.notes)
        for level, line in lines:
            if line not in self._said:
                log.log(level, "%s", line)
        if self._in_trouble and not update.problems:
            log.info("%s: all object files are good", self._path)
        self._in_trouble = bool(update.problems)
        self._said = frozenset(line for _, line in lines)
