"""`kproxy completion`: print a shell completion script."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from kproxy.cli.console import CommandFailedError, show
from kproxy.cli.control_client import fetch_service_names
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

TAB then completes commands, flags, flag values and file names. Where root can
ask the daemon, it also completes the names of Services.

Needs an optional Python package (kproxy[completion]). To add it, run this in a
clone of kproxy:
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
"""Shell code that is appended to the bash script."""
ZSH = """\
# The script of shtab calls compdef only under `eval`. Also call it if the script is sourced from a file.
if [[ $zsh_eval_context[-1] == file ]]; then
  compdef _shtab_kproxy kproxy
  return
fi"""
"""Shell code that is inserted before the end of the zsh script."""
SERVICE = "NAMESPACE/SERVICE"
"""The metavar of arguments that name a Service."""
BASH_SERVICES = """
_kproxy_services() {
  compgen -W "$(kproxy completion bash --services 2>/dev/null)" -- "$1"
}"""
ZSH_SERVICES = """\
_kproxy_services() {
  compadd -- ${(f)"$(kproxy completion zsh --services 2>/dev/null)"}
}
"""
FISH_SERVICES = "(kproxy completion fish --services 2>/dev/null)"
"""Shell code that completes the names of Services, if a daemon can be asked."""
FISH_FILE = "(__fish_complete_path (string replace -r -- '^--[^=]*=' '' (commandline -ct)))"
"""Shell code that completes file names in fish, including those after `--flag=`."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "completion",
        help=COMMANDS["completion"],
        usage="kproxy completion bash|zsh|fish",
        description="Print a script that completes commands, flags, values and Services in a shell.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    parser.add_argument("--services", action="store_true", help=argparse.SUPPRESS)  # used by the scripts
    parser.set_defaults(command=_print_script)


def _print_script(options: argparse.Namespace) -> None:
    if options.services:
        show("".join(f"{name}\n" for name in fetch_service_names()))
        return
    show(script(options.shell))


def script(shell: str) -> str:
    """Return the completion script for `shell`, which must be one of `SHELLS`.

    Raises `CommandFailedError` if the Python package `shtab` is not installed.
    """
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
            if action.metavar == SERVICE:
                action.complete = {  # type: ignore[attr-defined]
                    "bash": "_kproxy_services",
                    "zsh": "_kproxy_services",
                    "fish": FISH_SERVICES,
                }
    preambles = {"bash": BASH_SERVICES, "zsh": ZSH_SERVICES + ZSH, "fish": ""}
    text = shtab.complete(parser, shell, preamble=preambles[shell])
    return f"{text}\n{BASH}" if shell == "bash" else text


def _prepare(action: argparse.Action, shell: str, file: Mapping[str, object]) -> None:
    """Tell shtab which values a flag accepts, or that its value is a file name.

    argparse does not have all of this information. For zsh, also append `=` to the names of flags that take a value.
    """
    if action.nargs == "?":
        # The scripts for zsh and fish do not support optional values, so in these scripts the flag takes no value.
        action.nargs, action.choices = ("?" if shell == "bash" else 0), ("true", "false")
    elif action.metavar in ("FILE", "PATH"):
        action.complete = file  # type: ignore[attr-defined]
    elif action.option_strings:
        action.choices = action.choices or WORDS.get(action.option_strings[-1])
    if shell == "zsh" and action.nargs != 0:
        # In zsh scripts, a trailing "=" means that the value is the next word or follows "=" in the same word.
        action.option_strings = [f"{option}=" for option in action.option_strings]
