"""Messages that the documentation quotes exist: log lines, errors, and parts of them in code spans.

Every string in the package is a template whose placeholders (`%s`, `{...}`) stand for values. A quoted message must match
a template. A value of more than a few words is wording, too, and must itself match a template or be a system error.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import kproxy
from tests.unit.test_docs import EVERY_PAGE, PAGES, ROOT, read

PACKAGE = Path(kproxy.__file__).parent
FILES = {path.name: path for path in PACKAGE.rglob("*.py")}

OTHER_MESSAGES = {
    "Connection refused": "clients",
    "Connection to 10.96.0.1 timed out. (connect timeout=10.0)": "urllib3",
    "HTTPSConnection(host='10.96.0.1', port=443): Failed to establish a new connection": "urllib3",
    "table full": "Linux",
    "unable to initialize table 'nat'": "iptables",
}
"""Quoted messages, and reasons in messages, of other programs, with the program."""

COMMANDS = frozenset(
    """apt-get cat conntrack curl dig firewall-cmd fuser ip iptables iptables-legacy-save iptables-nft-save
    iptables-restore iptables-save kproxy kubeadm kubectl make man modprobe mypy nc nft nslookup ping python source ss
    sysctl systemctl ufw""".split()
)
NAMES = frozenset({"flush ruleset", "ip6 kube-proxy"})
"""Spans of several words that are names or parts of commands."""

_LOG_LINE = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ (\w+\.py):\d+\] (.*)")
_LAST_LINE = re.compile(r"kproxy: (.*)")
_REASON = re.compile(r'"reason":".*"')
_FIELD = re.compile(r'[\w.]+: \S+|[\w.]+: \[.*\]')
_CODE = re.compile(r"[=|{}<>]| --?[a-z]|^[-!/\d.]|\S/\S*\.\w+$|^[A-Z_]+=")
_PLACEHOLDER = re.compile(r"%(?:\.\d)?([srdgf])")
_SEPARATOR = re.compile(r"[:;,] ")
_OMITTED = re.compile(r"\s*(?:…|\.\.\.)$")
_ADDED = re.compile(r"^IPv[46]: |^[\w./-]+\.yaml:\d+: | \(ignored\)$")
"""What many messages begin or end with, in addition to their template."""
_SHORT = 3
"""A value of at most this many words can be a name, or a number with its unit."""

SYSTEM_ERRORS = frozenset(
    text for code in errno.errorcode for text in (os.strerror(code), f"[Errno {code}] {os.strerror(code)}")
)


def _strings(path: Path) -> Iterator[list[str | None]]:
    """Yield the strings in a source file, without docstrings: their literal parts, and None for each placeholder."""
    tree = ast.parse(path.read_text())
    skipped = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            yield [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            pieces = _PLACEHOLDER.split(node.value)
            yield [piece if index % 2 == 0 else None for index, piece in enumerate(pieces)]


def _expressions(parts: list[str | None]) -> Iterator[str]:
    """Yield the regular expression of a template, preceded by those of its beginnings up to each separator."""
    expression = ""
    literal = ""
    for part in parts:
        if part is None:
            expression += "(.*?)"
            continue
        for separator in _SEPARATOR.finditer(part):
            if _has_words(literal + part[: separator.start()]):
                yield expression + re.escape(part[: separator.start()])
        expression += re.escape(part)
        literal += part
    if _has_words(literal):
        yield expression.removesuffix(r"\n").removesuffix("\\\n")


def _has_words(literal: str) -> bool:
    return len(re.findall("[A-Za-z]", literal)) >= 6


@cache
def _templates() -> tuple[tuple[re.Pattern[str], ...], tuple[re.Pattern[str], ...], str]:
    """Return the templates, their beginnings, and all literal parts."""
    whole: dict[str, None] = {}
    beginnings: dict[str, None] = {}
    literals: list[str] = []
    for path in FILES.values():
        for parts in _strings(path):
            literals += [part for part in parts if part]
            expressions = list(_expressions(parts))
            beginnings.update(dict.fromkeys(expressions))
            whole.update(dict.fromkeys(expressions[-1:]))
    return tuple(map(re.compile, whole)), tuple(map(re.compile, beginnings)), "\n".join(literals)


@cache
def exists(text: str, *, whole: bool = True) -> bool:
    """Return whether kproxy writes a message, or with `whole=False` one that begins like this or contains it."""
    omitted = _OMITTED.search(text)
    if omitted:
        return exists(text[: omitted.start()].rstrip(":;, "), whole=False)
    templates, beginnings, literals = _templates()
    if text in OTHER_MESSAGES or (not whole and text in literals):
        return True
    for template in templates if whole else beginnings:
        match = template.fullmatch(text)
        if match and all(_is_value(value) for value in match.groups("")):
            return True
    shorter = _ADDED.sub("", text)
    return shorter != text and exists(shorter, whole=whole)


@cache
def _is_value(text: str) -> bool:
    text = text.strip()
    if len(text.split()) <= _SHORT or text in SYSTEM_ERRORS or exists(text):
        return True
    splits = _SEPARATOR.finditer(text)
    return any(_is_value(text[: split.start()]) and _is_value(text[split.end() :]) for split in splits)


def log_lines(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the source file and the message of each log line on a page, in text and in JSON."""
    for line in read(page).blocks:
        if found := _LOG_LINE.fullmatch(line):
            yield found[1], found[2]
        elif line.startswith('{"ts":'):
            fields = json.loads(line)
            yield Path(fields["caller"].partition(":")[0]).name, fields["msg"]


def messages(page: Path) -> Iterator[str]:
    """Yield the messages in code spans and, without `kproxy: `, the final lines of commands that failed."""
    for line in read(page).blocks:
        if found := _LAST_LINE.fullmatch(line):
            yield found[1]
    for span in read(page).spans:
        if _REASON.fullmatch(span):
            yield json.loads(f"{{{span}}}")["reason"]
        elif found := _LAST_LINE.fullmatch(span):
            yield found[1]
        elif " " in span and not (span.split()[0] in COMMANDS or _FIELD.fullmatch(span) or _CODE.search(span)):
            yield span


@EVERY_PAGE
def test_log_lines_exist(page: Path) -> None:
    assert [line for line in log_lines(page) if line[0] not in FILES or "log." not in FILES[line[0]].read_text()] == []
    assert [message for _, message in log_lines(page) if not exists(message)] == []


@EVERY_PAGE
def test_messages_in_prose_exist(page: Path) -> None:
    assert [text for text in messages(page) if text not in NAMES and not exists(text, whole=False)] == []
