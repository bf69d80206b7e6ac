"""Messages that the documentation quotes exist: log lines, errors, and parts of them in code spans.

Every string in the package is a template whose placeholders (`%s`, `{...}`) stand for values. A quoted message must
match a template. A value of more than a few words is wording, too, and must itself match a template or be a system
error.
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
from typing import TypeGuard

import pytest

import kproxy
from tests.unit.test_docs import EVERY_PAGE, PAGES, read

PACKAGE = Path(kproxy.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

NOT_OURS = {
    "Connection refused": "clients",
    "Connection to 10.96.0.1 timed out. (connect timeout=10.0)": "urllib3",
    "HTTPSConnection(host='10.96.0.1', port=443): Failed to establish a new connection": "urllib3",
    "table full": "Linux",
    "unable to initialize table 'nat'": "iptables",
}
"""Quoted messages of other programs, on their own or as the reason in a message of kproxy, with the program."""

COMMANDS = re.compile(
    r"(?:apt-get|cat|conntrack|curl|dig|firewall-cmd|fuser|ip|ip6?tables(?:-[a-z]+)*|kproxy|kubeadm|kubectl|make|man"
    r"|modprobe|mypy|nc|nft|nslookup|ping|pipx|python|source|ss|sysctl|systemctl|ufw) "
)
NAMES = {
    "flush ruleset": "part of a command",
    "ip6 kube-proxy": "an nftables table",
    "masquerade traffic for shop/web:http external destinations": "the comment of a rule",
}
"""Code spans of several words that are not messages, with what they are."""

_LOG_LINE = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ (\w+\.py):\d+\] (.*)")
_LAST_LINE = re.compile(r"kproxy: (.*)")
_REASON = re.compile(r'"reason":".*"')
_FIELD = re.compile(r"[\w.]+: (?:\S+|\[.*\])")
_CODE = re.compile(r"[=|{}<>]|(?:^| )--?[a-z]|^[!/\d]")
_OMITTED = re.compile(r"\s*(?:…|\.\.\.)$")
_PREFIX = re.compile(r"^\S+: ")
_CONSEQUENCE = re.compile(r" \(\w+\)$")

_PLACEHOLDER = re.compile(r"%(?:\.\d)?[srdgf]")
_SEPARATOR = re.compile(r"[:;,] ")
SYSTEM_ERRORS = frozenset(
    text for code in errno.errorcode for text in (os.strerror(code), f"[Errno {code}] {os.strerror(code)}")
)
SHORT = 3
"""A value of at most this many words is a name, or a number with its unit."""


# Templates.


def literal_parts(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield the parts between the placeholders of each string in a file, and the number of letters that it must have.

    Docstrings are skipped. Few letters, such as those of `%s: %s`, would match anything.
    """
    tree = ast.parse(path.read_text())
    skipped = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    formats = {argument for node in ast.walk(tree) if is_log_call(node) for argument in node.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            text = _PLACEHOLDER.sub("\0", node.value)
        else:
            continue
        yield text.strip("\n").split("\0"), 3 if node in formats else 6


def is_log_call(node: ast.AST) -> TypeGuard[ast.Call]:
    """Return whether a node is a call such as `log.warning(...)`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")


def expressions(parts: list[str], letters: int) -> Iterator[str]:
    """Yield the regular expressions for the beginnings of a template, up to each separator, and for all of it."""
    text = "\0".join(parts)
    for end in (*(found.start() for found in _SEPARATOR.finditer(text)), len(text)):
        if len(re.findall("[A-Za-z]", text[:end])) >= letters:
            yield "(.*?)".join(map(re.escape, text[:end].split("\0")))


@cache
def templates(*, whole: bool) -> tuple[re.Pattern[str], ...]:
    """Return all templates or, with `whole=False`, their beginnings as well."""
    found: dict[str, None] = {}
    for path in FILES:
        for parts, letters in literal_parts(path):
            every = list(expressions(parts, letters))
            found.update(dict.fromkeys(every[-1:] if whole else every))
    return tuple(map(re.compile, found))


@cache
def all_literals() -> str:
    return "\n".join("\n".join(parts) for path in FILES for parts, _ in literal_parts(path))


# Quoted messages.


@cache
def exists(text: str, *, whole: bool = True) -> bool:
    """Return whether kproxy writes a message or, with `whole=False`, one that contains this part.

    An ellipsis at the end stands for the rest of the message. What is added to a template may precede or follow it: an
    IP family, a file with a line, the consequence of an ignored problem.
    """
    if _OMITTED.search(text):
        return exists(_OMITTED.sub("", text).rstrip(":;, "), whole=False)
    if text in NOT_OURS or (not whole and text in all_literals()):
        return True
    matches = (template.fullmatch(text) for template in templates(whole=whole))
    if any(all(map(is_value, match.groups(""))) for match in matches if match):
        return True
    shorter = (pattern.sub("", text) for pattern in (_PREFIX, _CONSEQUENCE))
    return any(each != text and exists(each, whole=whole) for each in shorter)


@cache
def is_value(text: str) -> bool:
    """Return whether a text can replace a placeholder. It may be a list, and consist of two templates."""
    text = text.strip()
    if len(text.split()) <= SHORT or text in SYSTEM_ERRORS or exists(text):
        return True
    if any(exists(text[: space.start()]) and exists(text[space.start() :]) for space in re.finditer(" ", text)):
        return True
    separators = _SEPARATOR.finditer(text)
    return any(is_value(text[: found.start()]) and is_value(text[found.end() :]) for found in separators)


def log_lines(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the source file and the message of each log line on a page, in text and in JSON."""
    for line in read(page).blocks:
        if found := _LOG_LINE.fullmatch(line):
            yield found[1], found[2]
        elif line.startswith('{"ts":'):
            fields = json.loads(line)
            yield Path(fields["caller"].partition(":")[0]).name, fields["msg"]


def messages(page: Path) -> Iterator[str]:
    """Yield the messages and parts of messages in code spans, and the last lines of commands that failed."""
    for text in (*read(page).spans, *(line for line in read(page).blocks if _LAST_LINE.fullmatch(line))):
        if _REASON.fullmatch(text):
            yield json.loads(f"{{{text}}}")["reason"]
        elif found := _LAST_LINE.fullmatch(text):
            yield found[1]
        elif " " in text and not (COMMANDS.match(text) or _FIELD.fullmatch(text) or _CODE.search(text)):
            yield text


@EVERY_PAGE
def test_log_lines_exist(page: Path) -> None:
    logging_files = {path.name for path in FILES if "log." in path.read_text()}
    assert {file for file, _ in log_lines(page)} - logging_files == set()
    assert [message for _, message in log_lines(page) if not exists(message)] == []


@EVERY_PAGE
def test_messages_in_prose_exist(page: Path) -> None:
    assert [text for text in messages(page) if text not in NAMES and not exists(text, whole=False)] == []


def test_exceptions_are_quoted() -> None:
    text = "\n".join(" ".join(page.read_text().split()) for page in PAGES)
    assert [each for each in (*NOT_OURS, *NAMES) if each not in text] == []


def test_messages_are_found() -> None:
    assert len({message for page in PAGES for _, message in log_lines(page)}) > 10
    assert len({message for page in PAGES for message in messages(page)} - NAMES.keys() - NOT_OURS.keys()) > 20


@pytest.mark.parametrize(
    "text",
    [
        "IPv4: somebody else has removed rules of ours: putting them back",
        "IPv4: sync failed, trying again in 1.0 s: …",
        "IPv6 is left out: …",
        "IPv4: UDP flows to removed endpoints may live on: …",
        "cannot be read, its last good state stays",
        "cannot list services: Connection refused; next try in 0.9 s",
        "config.yaml:4: iptables.masqueradeBit: must be a whole number from 0 to 31, not 32",
        "healthzBindAddress 0.0.0.0:10256: cannot listen: Address already in use, trying again every 5 s",
        "others changed 3 chains at the same moment: written anew",
    ],
)
def test_messages_of_earlier_versions_do_not_exist(text: str) -> None:
    assert not exists(text)
    assert not exists(text, whole=False)
