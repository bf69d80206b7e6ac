"""Run external programs. All programs that kproxy runs are started by this module."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import subprocess
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL, SIGPIPE
from time import monotonic
from typing import IO, Any, BinaryIO

from msgspec import Struct

from kproxy.host.background import BackgroundCall, ThreadStartError
from kproxy.model.drift import CommitAuthor

PROBE_TIMEOUT_SECONDS = 30
"""Timeout for the programs that kproxy runs at startup to detect capabilities. A hung program
must not prevent kproxy from programming the node.
"""
SLOW_SECONDS = 5.0
"""How long a program may run without progress before a warning is logged. The interval doubles with each warning."""
RECENT_SECONDS = 5.0
"""For this many seconds after a program has exited, its process ID is still known as that of this program."""
_PIECE = 1 << 16
"""Number of characters that are written to a program at once: the capacity of a pipe."""
_LINES_PER_RESTART = 1000
_MAX_COMMITTERS = 1000
_RULE_PROGRAMS = ("iptables", "ip6tables", "xtables", "nft")
"""The beginnings of the names of programs that change nf_tables rules."""
_OUT_OF_MEMORY_SECONDS = 0.1
"""Pause before another attempt to do something for which there was not enough memory."""
_LOCKS = Path("/proc/locks")
_XTABLES_LOCK = "/run/xtables.lock"
"""The lock file of iptables, unless the environment variable XTABLES_LOCKFILE names another one."""
_UNUSABLE = {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EPERM, errno.ELOOP}
"""Errors that mean that a program cannot be executed at all. Other errors may be temporary, such as those caused by too
many processes.
"""

log = logging.getLogger(__name__)


class CommandError(Exception):
    """A program could not be run, or it failed. The message is one line that names the program and the reason."""


class InconclusiveError(CommandError):
    """A check has no result, because a program could not be run to completion or the kernel did not reply.

    A later attempt may succeed.
    """


class CompletedCommand(Struct, frozen=True):
    """A program's exit status and output.

    As in `subprocess`, `code` is the negative signal number if a signal terminated the program. It is -1 if the program
    exited with status 0 before it read all the input from `stream_input`. `timed_out` means that the program was killed
    because it exceeded its time limit.
    """

    code: int
    stdout: str
    stderr: str
    timed_out: bool = False

    @property
    def error_message(self) -> str:
        """The first line of the program's error output, or the signal that killed it."""
        return first_line(self.stderr) if self.code >= 0 or self.stderr else f"killed by signal {-self.code}"


class CommandRunner:
    """Runs programs, one at a time. Another thread may call `stop` to shut the runner down.

    Input and output are UTF-8. Invalid bytes are passed through as surrogate escapes (PEP 383). Each program is the
    leader of its own process group, so that it can be killed along with its child processes.
    """

    def __init__(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """Create a runner that calls `on_progress` when a program has read more of its input or has succeeded.

        It is called only for programs whose input is streamed, in the thread that runs the program.
        """
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False
        # When each program exited that was started recently, by PID. Infinite for a running program.
        self._exited: dict[int, float] = {}
        # The names of these programs, and which process made the first commit with a netlink port ID (see
        # `has_committed`).
        self._names: dict[int, str] = {}
        self._committers: dict[int, int] = {}

    def stop(self) -> None:
        """Kill the running program and wait for it to exit. Later runs raise `CommandError`."""
        with self._lock:
            self._stopped = True
            running = self._running
        if running is not None:
            _kill(running)
            running.wait()

    def has_run(self, pid: int) -> bool:
        """Return whether a process belongs to a program that is running or has exited in the last few seconds.

        The programs' child processes are found only while they run. Any thread may call this.
        """
        exited = self._exited
        if pid not in exited:
            pid = _process_group(pid)
        return monotonic() - exited.get(pid, -math.inf) < RECENT_SECONDS

    def has_committed(self, commit: CommitAuthor) -> bool:
        """Return whether a commit was probably made by a program for which `has_run` has returned True.

        The netlink port ID of a program is its PID, but in the PID namespace of its container. A program in another
        container can have the same one, as soon as a program of this runner has exited. Its commits are recognized by
        the name of the program, or because another process has made commits with that port ID before. Any thread may
        call this.
        """
        if not commit.process:
            return True  # the kernel does not tell
        names = self._names
        leader = commit.port if commit.port in names else _process_group(commit.port)
        if not (_changes_rules(commit.name) and _changes_rules(names.get(leader, commit.name))):
            return False
        return self._committers.setdefault(commit.port, commit.process) == commit.process

    def run(self, argv: Sequence[str], stdin: str = "", *, timeout: float) -> CompletedCommand:
        """Run a program and return its exit status and output.

        After `timeout` seconds the program is killed, and the result has a negative `code`. Raises `CommandError` if
        the program cannot be started. If the cause may be temporary, the error is an `InconclusiveError`.
        """
        pipe = subprocess.PIPE
        # The input is a file, not a pipe. In Python 3.11, a call to communicate() after a timeout does not resume
        # writing to a pipe, so the program would never receive the rest of its input.
        with (
            _memory_file("stdin") as file,
            self._start(argv, stdin=_fill(file, stdin), stdout=pipe, stderr=pipe) as (process, slow_log),
        ):
            now = monotonic()
            deadline = now + timeout
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=min(deadline, slow_log.due) - now)
                except subprocess.TimeoutExpired:
                    now = monotonic()
                else:
                    return CompletedCommand(process.returncode, stdout, stderr)
                if now >= deadline:
                    _kill(process)
                    return _timed_out(argv, timeout)
                slow_log.check(now)

    def stream_input(
        self, argv: Sequence[str], chunks: Iterable[str], *, timeout: float | Callable[[], float]
    ) -> CompletedCommand:
        """Run a program and write its input while the input is generated. Discard the program's standard output.

        If the program exits before all chunks are written, no more chunks are generated and `code` is not 0. The
        program is killed after `timeout` seconds, and `code` is then negative. Each chunk restarts the timeout; if
        `timeout` is a function, it is called again. If generating a chunk fails, the program is killed and the
        exception propagates. Raises `CommandError` if the program cannot be started.
        """
        limit = timeout if callable(timeout) else lambda: timeout
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        with self._watched(argv, limit(), **streams) as (process, stderr, watchdog):
            assert process.stdin is not None
            feed = _Feed(process.stdin, self._on_progress)
            complete = True
            for chunk in chunks:
                watchdog.restart(limit())
                if not feed.write(chunk):
                    complete = False
                    break
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            if watchdog.expired:
                return _timed_out(argv, watchdog.timeout)
            if process.returncode == 0 and not complete:
                return CompletedCommand(-1, "", f"{argv[0]} exited before reading all of its input")
            if process.returncode == 0:
                self._on_progress()
            return CompletedCommand(process.returncode, "", _read(stderr))

    @contextmanager
    def stream_output(self, argv: Sequence[str], *, timeout: float) -> Iterator[Iterator[str]]:
        """Run a program and yield an iterator over the lines of its output, without holding all output in memory.

        If the program is still writing when the caller leaves the context, it is terminated. After `timeout` seconds,
        it is killed; the timeout restarts every `_LINES_PER_RESTART` lines. Raises `CommandError` if the program cannot
        be started, fails or is killed.
        """
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with self._watched(argv, timeout, **streams) as (process, stderr, watchdog):
            assert process.stdout is not None
            yield _watch_lines(process.stdout, watchdog)
            process.stdout.close()  # SIGPIPE terminates a program that is still writing
            process.wait()
            if process.returncode not in {0, -SIGPIPE}:
                if watchdog.expired:
                    raise CommandError(_timed_out(argv, timeout).stderr)
                message = first_line(_read(stderr))
                raise CommandError(f"{argv[0]} failed with status {process.returncode}: {message}")

    @contextmanager
    def _watched(
        self, argv: Sequence[str], timeout: float, **streams: Any
    ) -> Iterator[tuple[subprocess.Popen[str], BinaryIO, _Watchdog]]:
        """Start a program with a watchdog and a file for its standard error.

        The program is killed if it is still running when the caller leaves the context.
        """
        # Standard error is a file, because nothing reads it while the program runs. A pipe could fill up and block the
        # program.
        with (
            _memory_file("stderr") as stderr,
            self._start(argv, stderr=stderr, **streams) as (process, slow_log),
        ):
            watchdog = _Watchdog(process, slow_log, timeout)
            try:
                watchdog.start()
                yield process, stderr, watchdog
            finally:
                watchdog.stop()
                _kill(process)

    @contextmanager
    def _start(self, argv: Sequence[str], **streams: Any) -> Iterator[tuple[subprocess.Popen[str], SlowCommandLog]]:
        with self._lock:
            if self._stopped:
                raise CommandError(f"cannot run {argv[0]}: kproxy is shutting down")
            try:
                process = subprocess.Popen(argv, encoding="utf-8", errors="surrogateescape", process_group=0, **streams)
            except OSError as error:
                error_type = CommandError if error.errno in _UNUSABLE else InconclusiveError
                raise error_type(f"cannot run {argv[0]}: {error.strerror or error}") from None
            self._running = process
        now = monotonic()
        self._exited = {pid: at for pid, at in self._exited.items() if now - at < RECENT_SECONDS} | {
            process.pid: math.inf
        }
        self._names = {pid: name for pid, name in self._names.items() if pid in self._exited} | {process.pid: argv[0]}
        self._committers.pop(process.pid, None)
        if len(self._committers) > _MAX_COMMITTERS:
            self._committers = {}
        slow_log = SlowCommandLog(argv[0], process.pid, monotonic())
        try:
            with process:
                try:
                    yield process, slow_log
                except BaseException:
                    _kill(process)  # or the exit of the context would wait for it, however long it runs
                    raise
        finally:
            self._running = None
            self._exited[process.pid] = monotonic()
            slow_log.log_exit(monotonic(), process.returncode)


def _changes_rules(program: str) -> bool:
    name = os.path.basename(program)
    return name.startswith(_RULE_PROGRAMS) and not name.endswith("-save")


class _Feed:
    """Writes the input of a program, and calls `on_progress` when the program has read more of it."""

    def __init__(self, stdin: IO[str], on_progress: Callable[[], object]) -> None:
        self._stdin = stdin
        self._on_progress = on_progress
        self._written = 0
        self._read = 0

    def write(self, text: str) -> bool:
        """Write text. Return False if the program no longer reads its input."""
        try:
            for start in range(0, len(text), _PIECE):
                self._written += self._stdin.write(text[start : start + _PIECE])
                self._stdin.flush()
                # A lower bound if some characters take several bytes.
                if (read := self._written - _unread_bytes(self._stdin)) > self._read:
                    self._read = read
                    self._on_progress()
        except BrokenPipeError:
            return False
        return True


def _unread_bytes(pipe: IO[str]) -> int:
    """Return the number of bytes in a pipe that have not been read."""
    count = array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, count)
    return count[0]


def _watch_lines(stdout: IO[str], watchdog: _Watchdog) -> Iterator[str]:
    for number, line in enumerate(stdout, 1):
        if number % _LINES_PER_RESTART == 0:
            watchdog.restart()
        yield line


def run(argv: Sequence[str], stdin: str = "", *, timeout: float) -> CompletedCommand:
    """Run a program as `CommandRunner.run` does. The program cannot be stopped before its timeout."""
    return CommandRunner().run(argv, stdin, timeout=timeout)


def first_line(text: str) -> str:
    """Return the first line of a program's error output, or a placeholder if there is none.

    Empty lines and comments of iptables (`#`) are skipped.
    """
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "no error message")


class SlowCommandLog:
    """Logs warnings while a program runs for a long time, and finally how the program exited.

    Times are in seconds of the monotonic clock.
    """

    def __init__(self, program: str, pid: int, now: float) -> None:
        self.program = program
        self._pid = pid
        self._started = now
        self._warned = False
        self._interval = SLOW_SECONDS
        self.postpone(now)

    def postpone(self, now: float) -> None:
        """Restart the interval before the next warning, because the program has made progress."""
        self.due = now + self._interval

    def check(self, now: float) -> None:
        """Log a warning that the program is still running, if a warning is `due`."""
        if now < self.due:
            return
        self._interval *= 2
        self.postpone(now)
        self._warned = True
        seconds = now - self._started
        log.warning(
            "%s is still running after %.0f s (pid %d)%s", self.program, seconds, self._pid, self._lock_holder()
        )

    def log_exit(self, now: float, code: int) -> None:
        """Log how the program exited, if a warning was logged before. `code` is as in `CompletedCommand`."""
        if not self._warned:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        log.info("%s %s after %.0f s (pid %d)", self.program, how, now - self._started, self._pid)

    def _lock_holder(self) -> str:
        """Return a suffix for the warning: which other process holds the xtables lock.

        Return "" if the program is not an iptables program, or if no other process holds the lock.
        """
        if "tables" not in os.path.basename(self.program):
            return ""
        path = os.environ.get("XTABLES_LOCKFILE", _XTABLES_LOCK)
        holder = lock_holder(path)
        # If `iptables` is a wrapper script, the holder may be the real iptables: a child process of the script, in the
        # same process group.
        if not holder or _process_group(holder) == self._pid:
            return ""
        return f"; xtables lock {path} is held by {_process_name(holder)} (pid {holder})"


class _Watchdog:
    """Kills a program after a timeout and logs warnings if the program is slow. The timeout can be restarted."""

    def __init__(self, process: subprocess.Popen[str], slow_log: SlowCommandLog, timeout: float) -> None:
        self.expired = False
        self.timeout = timeout
        self._process = process
        self._slow_log = slow_log
        self._stopped = threading.Event()
        self._thread: BackgroundCall | None = None
        self.restart()

    def start(self) -> None:
        """Start the watchdog's thread. Raises `InconclusiveError` if the system cannot create a thread."""
        try:
            self._thread = BackgroundCall(self._run)
        except ThreadStartError as error:
            raise InconclusiveError(f"cannot start a watchdog for {self._slow_log.program}: {error}") from None

    def stop(self) -> None:
        """Stop the thread without killing the program."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def restart(self, timeout: float | None = None) -> None:
        """Restart the timeout, with another length if one is given."""
        self.timeout = self.timeout if timeout is None else timeout
        now = monotonic()
        self._deadline = now + self.timeout
        self._slow_log.postpone(now)

    def _run(self) -> None:
        while True:
            try:
                self._watch()
            except MemoryError:  # the program must not stay without a watchdog
                time.sleep(_OUT_OF_MEMORY_SECONDS)
            else:
                return

    def _watch(self) -> None:
        now = monotonic()
        while not self._stopped.wait(min(self._deadline, self._slow_log.due) - now):
            now = monotonic()
            if now >= self._deadline:
                self.expired = True
                _kill(self._process)
                return
            self._slow_log.check(now)


def lock_holder(path: str) -> int:
    """Return the PID of the process that holds an flock(2) lock on a file, or 0 if no process does.

    The information is from /proc/locks (proc(5)), which does not show locks of processes in other PID namespaces.
    """
    try:
        status = os.stat(path)
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return 0
    return find_lock_holder(lines, f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}")


def find_lock_holder(lines: Iterable[str], inode: str) -> int:
    """Return the PID of the process that holds an flock(2) lock on a file, or 0 if no process does.

    `lines` are those of /proc/locks (proc(5)). `inode` is the file's device and inode in the format of that file.
    """
    for line in lines:
        # The second field is the type of the lock, or `->` if the process is waiting for the lock.
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == inode and fields[4].isdecimal():
            return int(fields[4])
    return 0


def _process_group(pid: int) -> int:
    with suppress(OSError, OverflowError):
        return os.getpgid(pid)
    return 0


def _process_name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process that has exited"


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a program and its child processes.

    The child processes matter if, for example, `iptables` is a script that waits for the real program.
    """
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)


def _timed_out(argv: Sequence[str], timeout: float) -> CompletedCommand:
    return CompletedCommand(-SIGKILL, "", f"{argv[0]} timed out after {timeout:.0f} s", timed_out=True)


def _memory_file(name: str) -> BinaryIO:
    """Open an empty file in memory. A file on disk is not possible if the root file system is read-only or full.

    Raises `InconclusiveError` if the process has too many open files, for example.
    """
    try:
        return open(os.memfd_create(name), "w+b")
    except OSError as error:
        raise InconclusiveError(f"cannot create a file in memory: {error.strerror}") from None


def _fill(file: BinaryIO, text: str) -> BinaryIO:
    file.write(text.encode("utf-8", "surrogateescape"))
    file.seek(0)
    return file


def _read(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "backslashreplace")
