"""`kproxy completion`: print a shell completion script."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from kproxy.cli.console import CommandFailedError, show
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config.flag_table import CONFIG_FLAGS

SHELLS = ("bash", "zsh", "fish")
WORDS = {flag.option: flag.choices for flag in CONFIG_FLAGS}
EPILOG = """\
examples:
  # bash: this shell, and every new one
  source <(kproxy completion bash)
  echo 'source <(kproxy completion bash)' >> ~/.bashrc
  # bash with the bash-completion package: loaded on first use
  mkdir -p ~/.local/share/bash-completion/completions
  kproxy completion bash > ~/.local/share/bash-completion/completions/kproxy
  # zsh: this shell, after `autoload -U compinit; compinit`
  source <(kproxy completion zsh)
  # zsh: every new shell; ~/.zfunc stands for a directory in $fpath
  kproxy completion zsh > ~/.zfunc/_kproxy
  # fish
  kproxy completion fish > ~/.config/fish/completions/kproxy.fish

TAB then completes commands, flags, flag values and file names.

Needs the extra kproxy[completion]. To add it, run this in a clone of kproxy:
pipx install --force '.[completion]'"""
BASH = """
# Bash splits --flag=value into three words; shtab's function expects two.
_kproxy() {
  local word words=() at=0 position=$COMP_CWORD
  for word in "${COMP_WORDS[@]}"; do
    if [[ $word != "=" ]]; then
      words+=("$word")
    elif (( at < COMP_CWORD )); then
      (( position -= 1 ))
    else
      words+=("")
    fi
    (( at += 1 ))
  done
  local COMP_WORDS=("${words[@]}") COMP_CWORD=$position
  _shtab_kproxy
}
complete -o bashdefault -F _kproxy kproxy
"""
"""Appended to the bash script."""
ZSH = """\
# shtab registers the function only under `eval`; do the same when sourced from a file.
if [[ $zsh_eval_context[-1] == file ]]; then
  compdef _shtab_kproxy kproxy
  return
fi"""
"""Inserted before the end of the zsh script."""
FISH_FILE = "(__fish_complete_path (string replace -r -- '^--[^=]*=' '' (commandline -ct)))"
"""File completion for fish, including `--flag=path`."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "completion",
        help=COMMANDS["completion"],
        usage="kproxy completion bash|zsh|fish",
        description="Print a script that completes commands, flags and flag values in a shell.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    parser.set_defaults(command=_print_script)


def _print_script(options: argparse.Namespace) -> None:
    show(script(options.shell))


def script(shell: str) -> str:
    """Return the script for one of `SHELLS`. Raises `CommandFailedError` if the `shtab` package is not installed."""
    try:
        import shtab
    except ImportError:
        raise CommandFailedError(
            "completion requires the Python package shtab; install it with: pip install 'kproxy[completion]'"
        ) from None

    from kproxy.cli.parser import command_line

    parser, commands = command_line(COMMANDS)
    for command in commands.values():
        for action in command.shown():
            _prepare(action, shell, {**shtab.FILE, "fish": FISH_FILE})
    text = shtab.complete(parser, shell, preamble=ZSH if shell == "zsh" else "")
    return f"{text}\n{BASH}" if shell == "bash" else text


def _prepare(action: argparse.Action, shell: str, file: Mapping[str, object]) -> None:
    """Add what argparse does not record about a flag but shtab needs: its values, and whether it takes a file."""
    if action.nargs == "?":
        # Only bash can offer an optional value; the other shells treat the flag as a switch.
        action.nargs, action.choices = ("?" if shell == "bash" else 0), ("true", "false")
    elif action.metavar in ("FILE", "PATH"):
        action.complete = file  # type: ignore[attr-defined]
    elif action.option_strings:
        action.choices = action.choices or WORDS.get(action.option_strings[-1])
    if shell == "zsh" and action.nargs != 0:
        # zsh syntax for a flag whose value is the next word or follows "=".
        action.option_strings = [f"{option}=" for option in action.option_strings]
