"""What runs in the pods, in bash, and what its lines say.

Every script that asks prints one line for each request: exit code, what was said, complaints, with tabs between.
"""

from __future__ import annotations

import re

from tests.e2e.cluster import Answer, Failure, Outcome

PATIENCE = 5
"""Seconds until a request counts as unanswered. Only packets that something dropped take that long."""

_CURL = f"curl -qgv --noproxy '*' --connect-timeout {PATIENCE} --max-time {2 * PATIENCE}"
_CURL_REFUSED, _CURL_TIMED_OUT = 7, 28

_ERRORS = """errors=$(mktemp)
trap 'rm -f "$errors"' EXIT"""

# The complaints are curl's lines about a connect that failed; the other lines of -v begin with < > { } or are progress.
ASK_TCP = f"""{_ERRORS}
for ((turn = 0; turn < $2; turn++)); do
  said=$({_CURL} -s --fail-early -w ' %{{num_connects}} ' "$1/hostname" "$1/clientip" 2>"$errors")
  printf '%s\\t%s\\t%s\\n' "$?" "$said" "$(grep -o 'failed: .*' "$errors" | tail -n 1)"
done
"""
"""Arguments: the base of the URL, how often. Both questions go over one connection."""

# One `read` system call takes one datagram, so dd and not `read`, which takes a byte at a time and loses the rest.
_EXCHANGE = f"""{_ERRORS}
exchange() {{
  for word in hostname clientip; do
    printf %s "$word" >&3 && timeout {PATIENCE} dd bs=2048 count=1 <&3 || return
    printf ' '
  done
}}
"""

_TELL_UDP = """printf '%s\\t%s\\t%s\\n' "$?" "$said" "$(grep -io -m 1 'connection refused' "$errors")\""""

ASK_UDP = f"""{_EXCHANGE}
for ((turn = 0; turn < $3; turn++)); do
  said=$({{ exec 3<>"/dev/udp/$1/$2" && exchange; }} 2>"$errors")
  {_TELL_UDP}
done
"""
"""Arguments: address, port, how often. Each request comes from a port of its own."""

ASK_FROM_ONE_SOCKET = f"""{_EXCHANGE}
exec 3<>"/dev/udp/$1/$2" || exit
while read -r line; do
  said=$(exchange 2>"$errors")
  {_TELL_UDP}
done
"""
"""Arguments: address, port. Asks once for each line that it reads."""

LOAD = f"""{_ERRORS}
turn=0
while [ ! -e "$2" ]; do
  said=$({_CURL} -s -w ' %{{time_connect}} ' "$1/hostname" 2>"$errors")
  printf '%s\\t%s\\t%s\\t%s\\n' $((++turn)) "$?" "$said" "$(grep -o 'failed: .*' "$errors" | tail -n 1)"
done
rm "$2"
echo "end $turn"
"""
"""Arguments: the base of the URL, a file that ends it once it is there. Numbers its lines, and says how many it was."""

GET = f"""{_CURL} -sk -w '\\n%{{http_code}}' "$1" 2>/dev/null"""
"""Argument: a URL. Prints the body, and on a line of its own the status, 000 without one."""

RESOLVE = """dig +search +short +tries=3 +time=2 "$4" "@$1" "$2" "$3\""""
"""Arguments: the server, the name, the type, `+tcp` or `+notcp`."""

KILL = """
for folder in /proc/[0-9]*; do
  if grep -q -F "$1" "$folder/cgroup" 2>/dev/null; then kill -KILL "${folder#/proc/}" && echo "${folder#/proc/}"; fi
done
"""
"""Argument: a container's id, which is in the name of its control group. Prints the processes that it killed."""


def outcome(line: str) -> Outcome:
    """Read a line of one of the scripts that ask."""
    code, said, complaint = line.split("\t")
    words = said.split()
    if code == "0" and len(words) == 4 and words[3] == "0":  # over TCP, with how many connects each answer took
        return Answer(words[0], host_of(words[2]))
    if code == "0" and len(words) == 2:
        return Answer(words[0], host_of(words[1]))
    return failure(int(code), said, complaint)


def failure(code: int, said: str, complaint: str) -> Failure:
    """Return what a request failed of, by its exit code (curl's, or that of `timeout`) and its complaint."""
    detail = f"exit code {code}: {complaint or said.strip() or 'nothing came back'}"
    complaint = complaint.lower()
    if "connection refused" in complaint or (code == _CURL_REFUSED and not complaint):
        return Failure("refused", detail)
    # `timeout` ends with 124, or in busybox with 143 for the SIGTERM that it sent.
    if code in {_CURL_TIMED_OUT, 124, 143} or "timed out" in complaint:
        return Failure("no answer", detail)
    return Failure("other", detail)


def host_of(endpoint: str) -> str:
    """Return the address of `address:port` or `[address]:port`, an IPv4 address in IPv6 form as IPv4."""
    return endpoint.rpartition(":")[0].strip("[]").removeprefix("::ffff:")


def status_and_body(printed: str) -> tuple[int, str]:
    """Read what `GET` printed. Raises `ConnectionError` where there was no HTTP answer."""
    body, _, status = printed.rpartition("\n")
    if not re.fullmatch("[1-5][0-9][0-9]", status):
        raise ConnectionError(f"no HTTP answer: {printed!r}")
    return int(status), body
