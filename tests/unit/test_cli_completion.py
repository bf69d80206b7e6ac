"""Completion in real shells that have sourced the output of `kproxy completion`."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kproxy.cli.completion import SHELLS, script
from kproxy.cli.parser import COMMANDS
from tests.lab.proxy import KPROXY

STUB = f"""\
#!/bin/sh
[ "$1 $3" = "completion --services" ] && printf 'shop/web\\nshop/api\\ndefault/db\\n' && exit
[ "$1" = completion ] && exec {KPROXY} "$@"
echo "called: $*."
"""
"""A kproxy that prints its arguments instead of executing the command."""

INTERACTIVE = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SOURCE = {
    "bash": "source <(kproxy completion bash)",
    "zsh": "autoload -U compinit; compinit -u -D; source <(kproxy completion zsh)",
    "zsh, by eval": 'autoload -U compinit; compinit -u -D; eval "$(kproxy completion zsh)"',
    "zsh, from fpath": "kproxy completion zsh > _kproxy; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D",
    "fish": "kproxy completion fish | source",
}
TYPED = [
    ("kproxy ren", "render"),
    ("kproxy run --proxy-mo", "run --proxy-mode"),
    ("kproxy run --proxy-mode nf", "run --proxy-mode nftables"),
    ("kproxy run --proxy-mode=nf", "run --proxy-mode=nftables"),
    ("kproxy run --config=settings.y", "run --config=settings.yaml"),
    ("kproxy run --config settings.y", "run --config settings.yaml"),
    ("kproxy run --cleanup --vm", "run --cleanup --vmodule"),
    (
        "kproxy run -v=4 --cluster-cidr=x --detect-local-mode=No",
        "run -v=4 --cluster-cidr=x --detect-local-mode=NodeCIDR",
    ),
    ("kproxy apply --objects=settings.yaml --masq", "apply --objects=settings.yaml --masquerade-all"),
    ("kproxy explain shop/w", "explain shop/web"),
    ("kproxy render --family=ipv4 --objects=sett", "render --family=ipv4 --objects=settings.yaml"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with one file and `bin/kproxy`, which prints its arguments."""
    (tmp_path / "settings.yaml").touch()
    stub = tmp_path / "bin" / "kproxy"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def environment(directory: Path) -> dict[str, str]:
    return {
        "PATH": f"{directory}/bin:{os.environ['PATH']}",
        "HOME": str(directory),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def session(command: list[str], directory: Path, source: str, lines: Sequence[str]) -> str:
    """Return the output of a shell on a terminal in which each line is typed, completed with TAB, and executed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execvpe(command[0], command, environment(directory))
    shown = b""
    # The quotes distinguish the output of the command from the echo of its input.
    os.write(terminal, f"{source}; echo rea''dy\n".encode())
    while b"ready" not in shown:
        shown += os.read(terminal, 65536)
    os.write(terminal, "".join(f"{line}\t\n" for line in lines).encode() + b"exit\n")
    try:
        while more := os.read(terminal, 65536):
            shown += more
    except OSError:
        pass  # the shell has exited, which closes the terminal
    os.waitpid(pid, 0)
    os.close(terminal)
    return shown.decode(errors="replace")


@pytest.mark.parametrize("name", SOURCE)
def test_tab_completes_on_a_terminal(name: str, directory: Path) -> None:
    shell = name.partition(",")[0]
    if not shutil.which(shell):
        pytest.skip(f"{shell} not found")
    text = session(INTERACTIVE[shell], directory, SOURCE[name], [line for line, _ in TYPED])
    called = [line.partition("called: ")[2].strip()[:-1] for line in text.splitlines() if line.startswith("called: ")]
    assert called == [completed for _, completed in TYPED], text


def bash_completions(directory: Path, *words: str) -> set[str]:
    """Return the completions of bash for the last word of a command line, split into words as bash does it."""
    quoted = " ".join(f"'{word}'" for word in words)
    commands = f"""
        source <(kproxy completion bash)
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        $(complete -p kproxy | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", commands],
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (("",), {*COMMANDS}),
        (("explain", "shop/"), {"shop/api", "shop/web"}),
        (("explain", "shop/w"), {"shop/web"}),
        (("top", "d"), {"default/db"}),
        (("run", "--proxy"), {"--proxy-mode", "--proxy-port-range"}),
        (("run", "--proxy-mode", "="), {"iptables", "nftables"}),
        (("run", "--proxy-mode", ""), {"iptables", "nftables"}),
        (("run", "--proxy_mode", "=", "x"), set()),
        (("run", "--detect-local-mode", "=", "N"), {"NodeCIDR"}),
        (("run", "--logging-format", "="), {"text", "json"}),
        (("run", "--iptables-localhost-nodeports", "="), {"true", "false"}),
        (("run", "--config", "=", "settings.yaml", "--proxy-mode", "=", "i"), {"iptables"}),
        (("run", "--config", "="), {"settings.yaml", "bin"}),
        (("run", "--kubeconfig", "=", "s"), {"settings.yaml"}),
        (("run", "--write-config-to", "s"), {"settings.yaml"}),
        (("run", "--cluster-cidr", "=", "s"), set()),
        (("render", "--family", ""), {"ipv4", "ipv6"}),
        (("apply", "--ipvs"), set()),
        (("apply", "--cl"), {"--cluster-cidr"}),
        (("run", "--cl"), {"--cluster-cidr", "--cleanup"}),
        (("completion", ""), set(SHELLS)),
    ],
)
def test_bash_completions(directory: Path, words: tuple[str, ...], completions: set[str]) -> None:
    assert bash_completions(directory, "kproxy", *words) == completions


@pytest.mark.parametrize("shell", SHELLS)
def test_only_the_script_is_printed(shell: str) -> None:
    done = subprocess.run([KPROXY, "completion", shell], capture_output=True, text=True, check=True)
    assert done.stdout == script(shell)
    assert done.stderr == ""


def test_spellings_with_underscores_are_not_offered() -> None:
    assert not any("proxy_mode" in script(shell) for shell in ("zsh", "fish"))
