"""The commands that docs/local.md gives to root print what the page shows."""

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

VARYING = (
    (r"^([IWE])\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ ([\w.]+:)\d+\] ", r"\1MMDD hh:mm:ss.uuuuuu PID \2LINE] "),
    (r"(after|in) [\d.]+ (milliseconds|ms|s)$", r"\1 so much time"),
    (r"no Node '.*'", "no Node 'of this name'"),
    (r"iptables \d+\.\d+\.\d+", "iptables VERSION"),
)
"""What differs from run to run, between machines, and with every change of the code: lines in log headers."""

LISTENING = "until curl --silent --output /dev/null http://192.0.2.10:8080/; do :; done"


def block() -> list[str]:
    """Return the lines of the block for the shell that has a network of its own."""
    text = (ROOT / "docs" / "local.md").read_text()
    (found,) = (part for part in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if part.startswith(OPENING))
    return str(found).splitlines()


def plain(text: str) -> str:
    for pattern, instead in VARYING:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text.strip("\n")


def test_a_network_of_your_own(kernel: None, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl not found")
    lines = block()
    commands = [line[2:] for line in lines if line.startswith("# ")]
    script = ["exec 2>&1"]
    for command in commands:
        script.append(f"cat <<'END'\n# {command}\nEND")
        # A human needs longer to type the next command than a server to listen.
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
    assert plain(output.read_text()) == plain("\n".join(lines))
