"""Write the manual pages to `docs/man/`, from the commands' help: `python -m tests.man_pages`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from kproxy import __version__
from kproxy.cli.parser import COMMANDS, DESCRIPTION, EPILOG, HelpFormatter, OneLineParser, command_line

FOLDER = Path(__file__).parent.parent / "docs/man"


def pages() -> dict[str, str]:
    """Return the text of all pages, by file name."""
    parser, commands = command_line(COMMANDS)
    found = {"kproxy.1": _main_page(parser)}
    for name, command in commands.items():
        found[f"kproxy-{name}.1"] = "\n".join([*_head(f"kproxy-{name}", COMMANDS[name]), *_command(command)]) + "\n"
    return found


def _main_page(parser: OneLineParser) -> str:
    lines = [*_head("kproxy", "service proxy for Kubernetes on Linux"), ".SH SYNOPSIS", escape(str(parser.usage))]
    lines += [".SH DESCRIPTION", *_text(DESCRIPTION), ".SH COMMANDS"]
    for name, summary in COMMANDS.items():
        lines += [".TP", f"\\fB{escape(name)}\\fR", f"{escape(summary)}; see", f".BR kproxy\\-{escape(name)} (1)"]
    return "\n".join([*lines, *_epilog(EPILOG)]) + "\n"


def _head(name: str, summary: str) -> list[str]:
    title = f'.TH "{escape(name.upper())}" "1" "" "kproxy {__version__}" "kproxy"'
    return [title, ".SH NAME", f"{escape(name)} \\- {escape(summary)}"]


def _command(command: OneLineParser) -> Iterator[str]:
    yield from (".SH SYNOPSIS", escape(str(command.usage)), ".SH DESCRIPTION", *_text(str(command.description)))
    formatter = HelpFormatter("kproxy")
    for group in command._action_groups:
        actions = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
        if actions:
            yield f".SH {escape(str(group.title).upper())}"
        for action in actions:
            yield from (".TP", f"\\fB{escape(formatter._format_action_invocation(action))}\\fR")
            yield from _text(formatter._expand_help(action) if action.help else "")
    yield from _epilog(str(command.epilog))


def _epilog(text: str) -> Iterator[str]:
    """Yield the examples and what follows them."""
    examples, _, rest = text.partition("\n\n")
    yield from (".SH EXAMPLES", ".nf", *(escape(line) for line in examples.splitlines()[1:]), ".fi")
    if rest:
        yield from (".SH NOTES", ".nf", *(escape(line) for line in rest.splitlines()), ".fi")


def _text(text: str) -> list[str]:
    return [escape(line) for line in text.splitlines() if line]


def escape(line: str) -> str:
    """Return a line that roff prints as it is."""
    line = line.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq")
    return f"\\&{line}" if line.startswith(".") else line


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.1"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
