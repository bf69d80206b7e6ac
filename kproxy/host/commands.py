"""Running programs: the only place that starts one."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL, SIGPIPE
from time import monotonic
from typing import IO, Any, BinaryIO

from msgspec import Struct

log = logging.getLogger(__name__)
FIRST_SECONDS = 5.0
"""How long a program may go without progress before that is logged; each later line waits twice as long."""
_LOCKS = Path("/proc/locks")
_LOCK_FILE = "/run/xtables.lock"


class SlowCommandLog:
    """What is logged about one program that is slow. Moments are seconds of any clock that never goes back."""

    def __init__(self, program: str, pid: int, now: float) -> None:
        self._program = program
        self._pid = pid
        self._began = now
        self._logged = False
        self._interval = FIRST_SECONDS
        self.progressed(now)

    def progressed(self, now: float) -> None:
        """Put the next line off: the program got somewhere, such as reading more of its input."""
        self.due = now + self._interval

    def look(self, now: float) -> None:
        """Log that the program still runs if that is `due`."""
        if now < self.due:
            return
        self._interval *= 2
        self.progressed(now)
        self._logged = True
        seconds = now - self._began
        log.warning("%s is still running after %.0f s (pid %d)%s", self._program, seconds, self._pid, self._obstacle())

    def ended(self, now: float, code: int) -> None:
        """Log that the program has ended, if it was logged that it still ran. `code` is as in `subprocess`."""
        if not self._logged:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        log.info("%s %s after %.0f s (pid %d)", self._program, how, now - self._began, self._pid)

    def _obstacle(self) -> str:
        """Return what an iptables program may be waiting for, to be appended to a message, or ""."""
        if "tables" not in os.path.basename(self._program):
            return ""
        path = os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE)
        holder = lock_holder(path)
        # A program is the leader of a process group that what it starts belongs to: see `run.py`.
        if not holder or _group(holder) == self._pid:
            return ""
        return f"; the xtables lock {path} is held by {_name(holder)} (pid {holder})"


def lock_holder(path: str) -> int:
    """Return the pid of the process that holds an flock(2) on a file, 0 if there is none to be seen (proc(5)).

    Processes of other PID namespaces cannot be seen.
    """
    try:
        status = os.stat(path)
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return 0
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        # A line with an arrow in the second place is about somebody who waits.
        _, kind, *rest = line.split()
        if kind == "FLOCK" and len(rest) > 3 and rest[3] == place:
            return int(rest[2])
    return 0


def _group(pid: int) -> int:
    with suppress(OSError):
        return os.getpgid(pid)
    return 0


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a program that has ended"


START_SECONDS = 30
"""How long a program may take to say at the start what it can do. One that hangs then must not keep a node waiting."""
_UNUSABLE = {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EPERM, errno.ELOOP}
"""Why a program cannot be started at all; anything else, such as too many processes, may pass."""


class CommandError(Exception):
    """A program could not be run, or ended with an error; the message says which and why, on one line."""


class InconclusiveError(CommandError):
    """There is no answer, because a program could not be run to its end, or the kernel not asked: again, it may."""


class CompletedCommand(Struct, frozen=True):
    """How a program ended: `code` is its exit status, or below 0 if a signal ended it, as one that hangs is ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """What it said went wrong, on a line."""
        return first_line(self.stderr) if self.code >= 0 or self.stderr else f"ended by signal {-self.code}"


class _Watchdog:
    """Kills a program after a number of seconds, unless it is told that they begin anew; logs if it takes long."""

    def __init__(self, process: subprocess.Popen[str], patience: SlowCommandLog, timeout: float) -> None:
        self.expired = False
        self._process = process
        self._patience = patience
        self._timeout = timeout
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self.begin_anew()

    def start(self) -> None:
        """Begin to watch. Raises `CommandError` if the system has no thread left for that."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise InconclusiveError(f"cannot watch over a program: {error}") from None

    def end(self) -> None:
        """Let the program live."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin_anew(self) -> None:
        """Let the seconds begin anew."""
        now = monotonic()
        self._deadline = now + self._timeout
        self._patience.progressed(now)

    def _watch(self) -> None:
        now = monotonic()
        while not self._ended.wait(min(self._deadline, self._patience.due) - now):
            now = monotonic()
            if now >= self._deadline:
                self.expired = True
                _kill(self._process)
                return
            self._patience.look(now)


class CommandRunner:
    """Runs programs one at a time; another thread may stop that for good.

    What programs read and write is UTF-8; other bytes come and go as surrogate escapes (PEP 383).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Kill the program that runs now, wait for its end, and refuse to start others."""
        with self._lock:
            self._stopped = True
            running = self._running
        if running is not None:
            _kill(running)
            running.wait()

    def run(self, argv: Sequence[str], stdin: str = "", *, timeout: float) -> CompletedCommand:
        """Run a program to its end and return what it said.

        `timeout` is in seconds and guards against hanging: the program is then killed. Raises `CommandError` if it
        cannot be started.
        """
        pipe = subprocess.PIPE
        # A file, not a pipe: once interrupted, communicate() does not write the rest of an input (Python 3.11).
        with (
            _file_of("stdin") as file,
            self._start(argv, stdin=_filled(file, stdin), stdout=pipe, stderr=pipe) as (process, patience),
        ):
            now = monotonic()
            deadline = now + timeout
            while True:
                try:
                    said, complaints = process.communicate(timeout=min(deadline, patience.due) - now)
                except subprocess.TimeoutExpired:
                    now = monotonic()
                else:
                    return CompletedCommand(process.returncode, said, complaints)
                if now >= deadline:
                    _kill(process)
                    return _hung(argv, timeout)
                patience.look(now)

    def feed(self, argv: Sequence[str], parts: Iterable[str], *, timeout: float) -> CompletedCommand:
        """Run a program on an input of many parts, which are asked for while it works on those before.

        What it prints is not kept. If it ends before all parts are in its pipe, no more are asked for, and `code` is
        not 0. `timeout` is as in `run`, and counts from the last part that went there. If making a part fails, the
        program is killed, and that is raised. Raises `CommandError` if it cannot be started.
        """
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        with self._guarded(argv, timeout, **streams) as (process, complaints, guard):
            assert process.stdin is not None
            whole = all(self._takes(process.stdin, part, guard) for part in parts)
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            if guard.expired:
                return _hung(argv, timeout)
            if process.returncode == 0 and not whole:
                return CompletedCommand(-1, "", f"{argv[0]} ended before its input did")
            return CompletedCommand(process.returncode, "", _text_of(complaints))

    def _takes(self, stdin: IO[str], part: str, guard: _Watchdog) -> bool:
        """Return whether a program takes one more part of its input. For each it has as long as for the first."""
        guard.begin_anew()
        try:
            stdin.write(part)
            stdin.flush()
        except BrokenPipeError:
            return False
        return True

    @contextmanager
    def reading(self, argv: Sequence[str], *, timeout: float) -> Iterator[Iterator[str]]:
        """Run a program and read its output line by line, never holding all of it.

        Who leaves early ends the program. Raises `CommandError` if it cannot be started or ends with an error, which
        it also does when `timeout`, in seconds, is over.
        """
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with self._guarded(argv, timeout, **streams) as (process, complaints, _):
            assert process.stdout is not None
            yield process.stdout
            process.stdout.close()  # ends a program that still writes, by SIGPIPE
            process.wait()
            if process.returncode not in {0, -SIGPIPE}:
                complaint = first_line(_text_of(complaints))
                raise CommandError(f"{argv[0]} failed with status {process.returncode}: {complaint}")

    @contextmanager
    def _guarded(
        self, argv: Sequence[str], timeout: float, **streams: Any
    ) -> Iterator[tuple[subprocess.Popen[str], BinaryIO, _Watchdog]]:
        """Start a program, with a file for its complaints; kill it after `timeout` seconds, or at the end."""
        # A pipe could fill up unread.
        with (
            _file_of("stderr") as complaints,
            self._start(argv, stderr=complaints, **streams) as (process, patience),
        ):
            guard = _Watchdog(process, patience, timeout)
            try:
                guard.start()
                yield process, complaints, guard
            finally:
                guard.end()
                _kill(process)

    @contextmanager
    def _start(self, argv: Sequence[str], **streams: Any) -> Iterator[tuple[subprocess.Popen[str], SlowCommandLog]]:
        with self._lock:
            if self._stopped:
                raise CommandError(f"{argv[0]} is not started any more: kproxy is stopping")
            try:
                process = subprocess.Popen(argv, encoding="utf-8", errors="surrogateescape", process_group=0, **streams)
            except OSError as error:
                found = CommandError if error.errno in _UNUSABLE else InconclusiveError
                raise found(f"cannot run {argv[0]}: {error.strerror or error}") from None
            self._running = process
        patience = SlowCommandLog(argv[0], process.pid, monotonic())
        try:
            with process:
                yield process, patience
        finally:
            self._running = None
            patience.ended(monotonic(), process.returncode)


def run(argv: Sequence[str], stdin: str = "", *, timeout: float) -> CompletedCommand:
    """Run one program that nobody will want to stop; see `CommandRunner.run`."""
    return CommandRunner().run(argv, stdin, timeout=timeout)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a program with all that it has started: `iptables` may be a script that waits for the real one."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)


def _hung(argv: Sequence[str], timeout: float) -> CompletedCommand:
    return CompletedCommand(-SIGKILL, "", f"{argv[0]} did not end within {timeout:.0f} s")


def _file_of(name: str) -> BinaryIO:
    """Return an empty file without a file system: the root may be read-only."""
    return open(os.memfd_create(name), "w+b")


def _filled(file: BinaryIO, text: str) -> BinaryIO:
    """Return a file that holds this text, to be read from its beginning."""
    file.write(text.encode("utf-8", "surrogateescape"))
    file.seek(0)
    return file


def _text_of(complaints: BinaryIO) -> str:
    complaints.seek(0)
    return complaints.read().decode("utf-8", "backslashreplace")


def first_line(text: str) -> str:
    """Return the first line that says anything, for messages of one line; iptables' remarks begin with #."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "no message")
