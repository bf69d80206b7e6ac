"""The bash scripts that run in the test pods, and parsers of their output.

Every script that sends requests prints one line per request: exit code, answer and error message, separated by tabs.
"""

from __future__ import annotations

import re

from tests.e2e.cluster import Answer, Failure, Outcome

TIMEOUT = 5
"""Seconds until a request counts as unanswered. Only dropped packets take that long."""

_CURL = f"curl -qgv --noproxy '*' --connect-timeout {TIMEOUT} --max-time {2 * TIMEOUT}"
_CURL_REFUSED, _CURL_TIMED_OUT = 7, 28

_ERRORS = """errors=$(mktemp)
trap 'rm -f "$errors"' EXIT"""

# The error is the line of `curl -v` about a failed connect. Its other lines start with < > { } or show progress.
REQUEST_TCP = f"""{_ERRORS}
for ((turn = 0; turn < $2; turn++)); do
  answer=$({_CURL} -s --fail-early -w ' %{{num_connects}} ' "$1/hostname" "$1/clientip" 2>"$errors")
  printf '%s\\t%s\\t%s\\n' "$?" "$answer" "$(grep -o 'failed: .*' "$errors" | tail -n 1)"
done
"""
"""Arguments: base URL, number of requests. Both GETs use one connection."""

# dd reads a datagram with one system call. The `read` of bash reads single bytes and would lose the rest.
_EXCHANGE = f"""{_ERRORS}
exchange() {{
  for word in hostname clientip; do
    printf %s "$word" >&3 && timeout {TIMEOUT} dd bs=2048 count=1 <&3 || return
    printf ' '
  done
}}
"""

_PRINT_UDP = """printf '%s\\t%s\\t%s\\n' "$?" "$answer" "$(grep -io -m 1 'connection refused' "$errors")\""""

REQUEST_UDP = f"""{_EXCHANGE}
for ((turn = 0; turn < $3; turn++)); do
  answer=$({{ exec 3<>"/dev/udp/$1/$2" && exchange; }} 2>"$errors")
  {_PRINT_UDP}
done
"""
"""Arguments: address, port, number of requests. Each request uses a new source port."""

REQUEST_FROM_ONE_SOCKET = f"""{_EXCHANGE}
exec 3<>"/dev/udp/$1/$2" || exit
while read -r line; do
  answer=$(exchange 2>"$errors")
  {_PRINT_UDP}
done
"""
"""Arguments: address, port. Sends one request for each line on standard input."""

LOAD = f"""{_ERRORS}
turn=0
while [ ! -e "$2" ]; do
  answer=$({_CURL} -s -w ' %{{time_connect}} ' "$1/hostname" 2>"$errors")
  printf '%s\\t%s\\t%s\\t%s\\n' $((++turn)) "$?" "$answer" "$(grep -o 'failed: .*' "$errors" | tail -n 1)"
done
rm "$2"
echo "end $turn"
"""
"""Arguments: base URL, a file whose existence stops the script. Numbers the lines and prints their count at the end."""

GET = f"""{_CURL} -sk -w '\\n%{{http_code}}' "$1" 2>/dev/null"""
"""Argument: URL. Prints the body and, on a separate line, the status: 000 without an answer."""

RESOLVE = """dig +search +short +tries=3 +time=2 "$4" "@$1" "$2" "$3\""""
"""Arguments: server, name, record type, `+tcp` or `+notcp`."""

KILL = """
for folder in /proc/[0-9]*; do
  if grep -q -F "$1" "$folder/cgroup" 2>/dev/null; then kill -KILL "${folder#/proc/}" && echo "${folder#/proc/}"; fi
done
"""
"""Argument: container ID, which is part of its cgroup path. Prints the PIDs of the killed processes."""


def outcome(line: str) -> Outcome:
    """Parse a line of a script that sends requests."""
    code, answer, error = line.split("\t")
    words = answer.split()
    if code == "0" and len(words) == 4 and words[3] == "0":  # TCP: each answer is followed by its number of connects
        return Answer(words[0], host_of(words[2]))
    if code == "0" and len(words) == 2:
        return Answer(words[0], host_of(words[1]))
    return failure(int(code), answer, error)


def failure(code: int, answer: str, error: str) -> Failure:
    """Classify a failed request by its exit code (of curl or `timeout`) and its error message."""
    detail = f"exit code {code}: {error or answer.strip() or 'no answer'}"
    error = error.lower()
    if "connection refused" in error or (code == _CURL_REFUSED and not error):
        return Failure("refused", detail)
    # `timeout` exits with 124; the one of busybox exits with 143, for the SIGTERM that it sent.
    if code in {_CURL_TIMED_OUT, 124, 143} or "timed out" in error:
        return Failure("no answer", detail)
    return Failure("other", detail)


def host_of(endpoint: str) -> str:
    """Return the address of `address:port` or `[address]:port`. IPv4-mapped IPv6 addresses become IPv4."""
    return endpoint.rpartition(":")[0].strip("[]").removeprefix("::ffff:")


def status_and_body(output: str) -> tuple[int, str]:
    """Parse the output of `GET`. Raises `ConnectionError` if there was no HTTP answer."""
    body, _, status = output.rpartition("\n")
    if not re.fullmatch("[1-5][0-9][0-9]", status):
        raise ConnectionError(f"no HTTP answer: {output!r}")
    return int(status), body
