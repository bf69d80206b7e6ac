"""The output of `--help`: valid examples, correct defaults, and a readable layout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from typing import get_args

import msgspec
import pytest

from kproxy.cli.parser import COMMANDS, command_line, parse
from kproxy.config import Config, apply_flags
from kproxy.config.flag_table import CONFIG_FLAGS, GROUPS, PORT_FLAGS, Flag
from kproxy.config.types import LocalMode, Mode
from tests.lab.proxy import KPROXY

DOCUMENTED = [flag for title, flags in GROUPS.items() if title != "no effect" for flag in flags]
PAGES = [(), *((name,) for name in COMMANDS)]


def page(*command: str) -> str:
    """Return the help of a command, or the main help, for a terminal with 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([KPROXY, *command, "--help"], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return done.stdout


def examples(text: str) -> list[list[str]]:
    """Return the arguments of each kproxy call in the examples section of a help."""
    section = text.split("\nexamples:\n")[1].split("\n\n", 1)[0].replace("\\\n", "")
    calls = []
    for line in section.splitlines():
        assert line.startswith("  "), line
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] | None = None
        for word in lexer:
            if word == "kproxy":
                words = []
                calls.append(words)
            elif set(word) <= set("|&;<>()"):
                words = None
            elif words is not None:
                words.append(word)
    return calls


EXAMPLES = {command: examples(page(*command)) for command in PAGES}


@pytest.mark.parametrize("words", [words for calls in EXAMPLES.values() for words in calls], ids=" ".join)
def test_example_is_accepted_with_its_values(words: list[str]) -> None:
    options = parse(words)
    assert callable(options.command)
    if words[0] != "completion":
        assert apply_flags(Config(), options)[1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_at_least_three_examples(name: str) -> None:
    assert len([words for words in EXAMPLES[name,] if words[0] == name]) >= 3


def test_examples_of_run_use_its_main_flags() -> None:
    used = {word.partition("=")[0] for words in EXAMPLES["run",] for word in words[1:]}
    assert used >= {"--config", "--kubeconfig", "--objects", "--proxy-mode", "--hostname-override", "--cleanup"}
    assert used >= {"--init-only", "--write-config-to", "--cluster-cidr", "--metrics-bind-address", "-v"}


def test_main_help_has_an_example_and_a_summary_of_each_command() -> None:
    assert {words[0] for words in EXAMPLES[()]} == {"run", "apply", "render", "explain"}
    assert all(re.search(rf"\n +{name} +{summary.split()[0]} ", page()) for name, summary in COMMANDS.items())


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_help_fits_80_columns(command: tuple[str, ...]) -> None:
    assert [line for line in page(*command).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_flags_are_not_broken_at_line_ends(command: tuple[str, ...]) -> None:
    assert re.findall(r"--[a-z-]*-$", page(*command), re.MULTILINE) == []


def test_flags_are_listed_in_their_groups() -> None:
    section = ""
    shown: dict[str, list[str]] = {}
    for line in page("run").split("\nexamples:\n")[0].splitlines():
        if line.endswith(":") and not line.startswith(" "):
            section = line[:-1]
        elif match := re.match(r"  (?:-v, )?(--[a-z-]+)(=|\[=BOOL\])", line):
            shown.setdefault(section, []).append(match[1])
    for title, flags in GROUPS.items():
        assert [name for name in shown[title] if name not in ("--config", "--strict-config", "--master")] == [
            flag.option for flag in flags
        ]
    assert shown["actions"] == ["--write-config-to", "--cleanup", "--init-only"]


@pytest.mark.parametrize("name", ["apply", "render"])
def test_flags_irrelevant_to_a_command_are_accepted_but_hidden(name: str) -> None:
    shown = command_line({name})[1][name].flags()
    assert "--cluster-cidr" in shown
    assert "--conntrack-min" not in shown
    assert "--conntrack-min" not in page(name)
    assert "no effect" not in page(name)
    options = parse([name, "--objects=x", "--conntrack-min=5", "--ipvs_scheduler=rr", "--metrics-port=1"])
    assert apply_flags(Config(), options)[0].conntrack.min == 5


def documented_default(flag: Flag) -> str | None:
    """Return the default in the help of a flag if it is a value, not a description."""
    match = re.search(r"default: (\S+)\)", flag.help) or re.search(r"(\w+) \(default\)", flag.help)
    return match[1] if match else None


@pytest.mark.parametrize("flag", DOCUMENTED, ids=lambda flag: flag.name)
def test_documented_default_is_the_default(flag: Flag) -> None:
    if (default := documented_default(flag)) is not None:
        config, warnings = apply_flags(Config(), parse(["run", f"{flag.option}={default}"]))
        assert config.effective_mode == Config().effective_mode
        assert (msgspec.structs.replace(config, mode=""), warnings) == (Config(), [])


@pytest.mark.parametrize("flag", DOCUMENTED, ids=lambda flag: flag.name)
def test_every_number_switch_and_duration_documents_its_default(flag: Flag) -> None:
    assert flag.help
    if (flag.kind in ("int", "bool") or flag.metavar in ("DURATION", "MODE")) and flag not in PORT_FLAGS:
        assert documented_default(flag) is not None


def test_documented_choices_are_accepted() -> None:
    choices = {flag.name: flag.choices for flag in CONFIG_FLAGS if flag.choices}
    assert choices["proxy-mode"] == get_args(Mode)
    assert choices["detect-local-mode"] == get_args(LocalMode)
    for name, values in choices.items():
        for value in values:
            detail = {
                "BridgeInterface": ["--pod-bridge-interface=b"],
                "InterfaceNamePrefix": ["--pod-interface-name-prefix=b"],
            }
            apply_flags(Config(), parse(["run", f"--{name}={value}", *detail.get(value, [])]))
