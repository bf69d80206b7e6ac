"""The commands as a person meets them: output, exit codes, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kproxy
from tests.recordings import GOLDEN

KPROXY = str(Path(sys.executable).with_name("kproxy"))
CLUSTER = str(GOLDEN / "clusterip")


def run(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/nonexistent"}
    return subprocess.run([KPROXY, *arguments], capture_output=True, text=True, env=environment, check=False)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what is wrong; log lines before it begin with a date."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("20")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "kproxy: the following arguments are required: COMMAND"),
        (("frobnicate",), "kproxy: argument COMMAND: invalid choice: 'frobnicate'"),
        (("render",), "kproxy render: the following arguments are required: --objects"),
        (("apply", f"--objects={CLUSTER}", "--frob"), "kproxy: unrecognized arguments: --frob"),
        (("render", f"--objects={CLUSTER}", "--family=ipx"), "kproxy render: argument --family: invalid choice: 'ipx'"),
        (("render", f"--objects={CLUSTER}", "--cluster-cidr=pods"), "kproxy: --cluster-cidr: must be a CIDR"),
        (("render", f"--objects={CLUSTER}", "--proxy-mode=ipvs"), "kproxy: --proxy-mode: "),
        (("render", f"--objects={CLUSTER}", "--config=/nonexistent.yaml"), "kproxy: /nonexistent.yaml: "),
        (("run", f"--objects={CLUSTER}", "--iptables-masquerade-bit=32"), "kproxy: --iptables-masquerade-bit: "),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint(done).startswith(says)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("render", "--objects=/nonexistent"), "kproxy: /nonexistent: cannot be read: no such file or directory"),
        (("run", "--kubeconfig=/nonexistent"), "kproxy: /nonexistent: No such file or directory"),
        (("run",), "kproxy: in-cluster service account: "),
    ],
)
def test_failure_is_one_line_and_exit_code_1(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert complaint(done).startswith(says)


def test_a_broken_object_is_named_with_its_line(tmp_path: Path) -> None:
    broken = tmp_path / "web.yaml"
    broken.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
        "spec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: http\n"
    )
    done = run("render", f"--objects={broken}")
    assert done.returncode == 1
    assert complaint(done).startswith(f"kproxy: {broken}:7: Service default/web: spec.ports[0].port: ")


def test_without_iptables_it_says_so() -> None:
    done = run("apply", f"--objects={CLUSTER}", path="/nonexistent")
    assert done.returncode == 1
    assert complaint(done) == "kproxy: iptables mode does not work here: cannot run iptables: No such file or directory"


def test_render_prints_both_families_or_the_one_asked_for() -> None:
    both = run("render", f"--objects={CLUSTER}", f"--config={CLUSTER}/config.json")
    assert both.returncode == 0
    texts = [
        run("render", f"--objects={CLUSTER}", f"--config={CLUSTER}/config.json", f"--family={family}").stdout
        for family in ("ipv4", "ipv6")
    ]
    assert "--to-destination 10.244.1.1:8080" in texts[0]
    assert "10.244" not in texts[1]
    assert both.stdout == (
        f"# IPv4: input for iptables-restore --noflush\n{texts[0]}"
        f"# IPv6: input for ip6tables-restore --noflush\n{texts[1]}"
    )


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{KPROXY} render --objects={GOLDEN}/random-11 | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "# IPv4: input for iptables-restore --noflush\n"
    assert "Error" not in done.stderr


def test_version() -> None:
    assert run("--version").stdout == f"kproxy {kproxy.__version__}\n"


@pytest.mark.parametrize("command", ["run", "apply", "render"])
def test_help_has_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"examples:\n  kproxy {command} " in done.stdout
