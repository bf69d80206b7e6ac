"""What `--help` says: that its examples are right, its defaults true, and that it can be read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from kproxy.cli.parser import COMMANDS, command_line, parse
from kproxy.config import Config, apply_flags
from kproxy.config.flag_table import CONFIG_FLAGS, GROUPS, PORT_FLAGS, Flag
from kproxy.config.types import LocalMode, Mode

KPROXY = str(Path(sys.executable).with_name("kproxy"))
STATED = [flag for title, flags in GROUPS.items() if title != "no effect" for flag in flags]
PAGES = [(), *((name,) for name in COMMANDS)]


def page(*command: str) -> str:
    """The help of a command, or of all, as it is on a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([KPROXY, *command, "--help"], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return done.stdout


def examples(text: str) -> list[list[str]]:
    """The words of each call of kproxy in the examples of a help, without its own name."""
    section = text.split("\nexamples:\n")[1].split("\n\n", 1)[0].replace("\\\n", "")
    found = []
    for line in section.splitlines():
        assert line.startswith("  "), line
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] | None = None
        for word in lexer:
            if word == "kproxy":
                words = []
                found.append(words)
            elif set(word) <= set("|&;<>()"):
                words = None
            elif words is not None:
                words.append(word)
    return found


EXAMPLES = {command: examples(page(*command)) for command in PAGES}


@pytest.mark.parametrize("words", [words for found in EXAMPLES.values() for words in found], ids=" ".join)
def test_an_example_is_taken_with_its_values(words: list[str]) -> None:
    options = parse(words)
    assert callable(options.command)
    if words[0] != "completion":
        assert apply_flags(Config(), options)[1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_several_examples_of_its_own(name: str) -> None:
    assert len([words for words in EXAMPLES[name,] if words[0] == name]) >= 3


def test_the_examples_of_run_show_what_it_is_for() -> None:
    used = {word.partition("=")[0] for words in EXAMPLES["run",] for word in words[1:]}
    assert used >= {"--config", "--kubeconfig", "--objects", "--proxy-mode", "--hostname-override", "--cleanup"}
    assert used >= {"--init-only", "--write-config-to", "--cluster-cidr", "--metrics-bind-address", "-v"}


def test_the_first_help_shows_each_command_that_acts() -> None:
    assert {words[0] for words in EXAMPLES[()]} == {"run", "apply", "render"}
    assert all(re.search(rf"\n +{name} +{summary.split()[0]} ", page()) for name, summary in COMMANDS.items())


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_it_fits_80_columns(command: tuple[str, ...]) -> None:
    assert [line for line in page(*command).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_no_flag_is_broken_in_two(command: tuple[str, ...]) -> None:
    assert re.findall(r"--[a-z-]*-$", page(*command), re.MULTILINE) == []


def test_flags_are_shown_under_their_headings_as_they_are_written() -> None:
    section = ""
    shown: dict[str, list[str]] = {}
    for line in page("run").split("\nexamples:\n")[0].splitlines():
        if line.endswith(":") and not line.startswith(" "):
            section = line[:-1]
        elif found := re.match(r"  (?:-v, )?(--[a-z-]+)(=|\[=BOOL\])", line):
            shown.setdefault(section, []).append(found[1])
    for title, flags in GROUPS.items():
        assert [name for name in shown[title] if name not in ("--config", "--strict-config", "--master")] == [
            each.option for each in flags
        ]
    assert shown["actions"] == ["--write-config-to", "--cleanup", "--init-only"]


@pytest.mark.parametrize("name", ["apply", "render"])
def test_what_means_nothing_to_a_command_is_taken_and_not_shown(name: str) -> None:
    shown = command_line({name})[1][name].flags()
    assert "--cluster-cidr" in shown
    assert "--conntrack-min" not in shown
    assert "--conntrack-min" not in page(name)
    assert "no effect" not in page(name)
    options = parse([name, "--objects=x", "--conntrack-min=5", "--ipvs_scheduler=rr", "--metrics-port=1"])
    assert apply_flags(Config(), options)[0].conntrack.min == 5


def stated_default(flag: Flag) -> str | None:
    """The default that the help names, if it is a value and not a description of one."""
    found = re.search(r"default: (\S+)\)", flag.help) or re.search(r"(\w+) \(default\)", flag.help)
    return found[1] if found else None


@pytest.mark.parametrize("flag", STATED, ids=lambda flag: flag.name)
def test_a_stated_default_is_the_default(flag: Flag) -> None:
    if (default := stated_default(flag)) is not None:
        assert apply_flags(Config(), parse(["run", f"{flag.option}={default}"])) == (Config(), [])


@pytest.mark.parametrize("flag", STATED, ids=lambda flag: flag.name)
def test_each_number_switch_and_duration_has_its_default_stated(flag: Flag) -> None:
    assert flag.help
    if (flag.kind in ("int", "bool") or flag.metavar in ("DURATION", "MODE")) and flag not in PORT_FLAGS:
        assert stated_default(flag) is not None


def test_the_words_that_are_offered_are_those_that_are_taken() -> None:
    words = {flag.name: flag.choices for flag in CONFIG_FLAGS if flag.choices}
    assert words["proxy-mode"] == get_args(Mode)
    assert words["detect-local-mode"] == get_args(LocalMode)
    for name, each in words.items():
        for word in each:
            detail = {
                "BridgeInterface": ["--pod-bridge-interface=b"],
                "InterfaceNamePrefix": ["--pod-interface-name-prefix=b"],
            }
            apply_flags(Config(), parse(["run", f"--{name}={word}", *detail.get(word, [])]))
