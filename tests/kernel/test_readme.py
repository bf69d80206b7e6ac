"""The commands for root in docs/local.md print the output that the page shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.waiting import HANG_GUARD

ROOT = Path(__file__).parents[2]
OPENING = "# ip link set lo up "

REPLACEMENTS = (
    (r"^([IWE])\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ ([\w.]+:)\d+\] ", r"\1MMDD hh:mm:ss.uuuuuu PID \2LINE] "),
    (r"(after|in) [\d.]+ (milliseconds|ms|s)$", r"\1 DURATION"),
    (r"no Node '.*'", "no Node 'NAME'"),
    (r"iptables \d+\.\d+\.\d+", "iptables VERSION"),
)
"""Text that differs between runs, machines and versions of the code, such as line numbers in log headers."""

LISTENING = "until curl --silent --output /dev/null http://192.0.2.10:8080/; do :; done"


def block() -> list[str]:
    """Return the lines of the code block for a shell in its own network namespace."""
    text = (ROOT / "docs" / "local.md").read_text()
    (found,) = (part for part in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if part.startswith(OPENING))
    return str(found).splitlines()


def normalized(text: str) -> str:
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip("\n")


def test_commands_in_a_network_namespace(kernel: None, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl not found")
    lines = block()
    commands = [line[2:] for line in lines if line.startswith("# ")]
    script = ["exec 2>&1"]
    for command in commands:
        script.append(f"cat <<'END'\n# {command}\nEND")
        # A person types the next command only after the server is listening.
        background = f"{command.removesuffix(' &')} >{tmp_path}/server 2>&1 &\n{LISTENING}"
        script.append(background if command.endswith("&") else command)
    file = tmp_path / "script"
    file.write_text("\n".join(script))
    output = tmp_path / "out"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with output.open("w") as written:
        subprocess.run(
            ["unshare", "--net", "bash", str(file)],
            cwd=ROOT,
            env=environment,
            stdout=written,
            check=False,
            timeout=HANG_GUARD,
        )
    assert normalized(output.read_text()) == normalized("\n".join(lines))
