"""The command line: output, exit codes, and one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kproxy
from kproxy.cli.parser import COMMANDS
from tests.lab.proxy import KPROXY
from tests.recordings import GOLDEN

CLUSTER = str(GOLDEN / "clusterip")
HEADER = re.compile(r"[IWEF][01]\d[0-3]\d [0-2]\d:[0-5]\d:[0-5]\d\.\d{6} [ \d]{6}\d [\w.]+:\d+\] ")


def run(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/nonexistent"}
    return subprocess.run([KPROXY, *arguments], capture_output=True, text=True, env=environment, check=False)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line of stderr that is not a log line; log lines have a header."""
    lines = [line for line in done.stderr.splitlines() if not HEADER.match(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("frobnicate",),
            f"kproxy: unknown command 'frobnicate'; commands: {', '.join(COMMANDS)} (see",
        ),
        (("rendr",), "kproxy: unknown command 'rendr'; did you mean render? (see kproxy --help)"),
        (("",), "kproxy: unknown command ''; commands: run, "),
        (
            ("--cluster-cidr=10.0.0.0/8",),
            "kproxy: --cluster-cidr must follow a command, for example `kproxy run --cluster-c",
        ),
        (("-v=4",), "kproxy: -v must follow a command, for example `kproxy run -v=4`"),
        (("--versoin",), "kproxy: unknown flag --versoin; did you mean --version? (see kproxy --help)"),
        (("--frob",), "kproxy: unknown flag --frob (see kproxy --help)"),
        (("render",), "kproxy: --objects=PATH is required: a file or directory with Services"),
        (("apply",), "kproxy: --objects=PATH is required: a file or directory with Services"),
        (
            ("apply", "--object=/nonexistent"),
            "kproxy apply: unknown flag --object; did you mean --objects? (see kproxy a",
        ),
        (("apply", "--objects=/nonexistent", "--frob"), "kproxy apply: unknown flag --frob (see kproxy apply --help)"),
        (("run", "--proxy_mod", "x"), "kproxy run: unknown flag --proxy_mod; did you mean --proxy-mode? (see"),
        (("run", "-config", "x"), "kproxy run: unknown flag -config; did you mean --config? (see"),
        (("run", "web.yaml"), "kproxy run: unexpected argument 'web.yaml' (see"),
        (("apply", "--objects=/nonexistent", "--cleanup"), "kproxy apply: unknown flag --cleanup"),
        (("render", f"--objects={CLUSTER}", "--write-config-to=x"), "kproxy render: unknown flag --write-config-to"),
        (("completion", "csh"), "kproxy completion: argument SHELL: invalid choice: 'csh' (choose from "),
        (
            ("completion",),
            "kproxy completion: the following arguments are required: SHELL (see kproxy completion --help)",
        ),
        (("render", f"--objects={CLUSTER}", "--family=ipx"), "kproxy render: argument --family: invalid choice: 'ipx'"),
        (("render", f"--objects={CLUSTER}", "--cluster-cidr=pods"), "kproxy: --cluster-cidr: must be a CIDR"),
        (("render", f"--objects={CLUSTER}", "--proxy-mode=ipvs"), "kproxy: --proxy-mode: "),
        (("render", f"--objects={CLUSTER}", "--config=/nonexistent.yaml"), "kproxy: /nonexistent.yaml: "),
        (("run", "--objects=/nonexistent", "--iptables-masquerade-bit=32"), "kproxy: --iptables-masquerade-bit: "),
        (
            ("run", "--objects=/nonexistent", "--logging-format=xml"),
            'kproxy: --logging-format: must be text or json, not "',
        ),
        (("run", "--objects=/nonexistent", "--v=much"), 'kproxy: --v: must be an integer, not "much"'),
        (
            ("run", "--objects=/nonexistent", "-v=-1"),
            "kproxy: --v: must be an integer from 0 to 2147483647, not -1",
        ),
        (("run", "--objects=/nonexistent", "--vmodule=node"), 'kproxy: --vmodule: must be PATTERN=N, not "node"'),
        (
            ("run", "--objects=/nonexistent", "--vmodule=node=4", "--logging-format=json"),
            "kproxy: --vmodule: requires logging.format text",
        ),
        (
            ("run", "--strict-config=perhaps"),
            "kproxy run: argument --strict-config: must be true or false, not 'perhaps'",
        ),
    ],
)
def test_usage_error_is_one_line_with_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert error_line(done).startswith(message)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("render", "--objects=/nonexistent"), "kproxy: /nonexistent: cannot be read: no such file or directory"),
        (("run", "--kubeconfig=/nonexistent"), "kproxy: /nonexistent: No such file or directory"),
        (("run",), "kproxy: in-cluster service account: "),
    ],
)
def test_failure_is_one_line_with_exit_code_1(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert error_line(done).startswith(message)


def test_invalid_object_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    broken = tmp_path / "web.yaml"
    broken.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
        "spec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: http\n"
    )
    done = run("render", f"--objects={broken}")
    assert done.returncode == 1
    assert (
        error_line(done)
        == f'kproxy: {broken}:7: Service default/web: spec.ports[0].port must be an integer, not "http"'
    )


def test_line_break_in_a_value_does_not_start_another_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    file.write_text(f'{head}mode: "x\\u2028kproxy: forged line"\n')
    done = run("render", f"--objects={CLUSTER}", f"--config={file}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "x\\u2028kproxy: forged line" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("fo\x1b[31mo\nE forged\u202e",),
        ("--bog\x1b[31mus\nE forged",),
        ("render", "--objects=/tmp", "--bog\x1b[31mus\nE forged"),
        ("render", "--objects=/non\nexistent\x1b[31m"),
        ("render", "--objects=/tmp", "--config=/non\nexistent\x1b[31m"),
        ("render", "--objects=/tmp", "--hostname-override=a\x1b[31m\nb", "--v=\x1b\n"),
        ("render", "--objects=" + "n" * 10_000),
    ],
)
def test_control_characters_in_arguments_never_reach_the_terminal(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode in {1, 2}
    line = error_line(done)
    assert line.isprintable()
    assert len(line) < 5000


def test_missing_iptables_is_reported() -> None:
    done = run("apply", f"--objects={CLUSTER}", path="/nonexistent")
    assert done.returncode == 1
    problems = "; ".join(
        f"{family}: cannot run {name}: No such file or directory"
        for family, name in (("IPv4", "iptables"), ("IPv6", "ip6tables"))
    )
    assert error_line(done) == f"kproxy: iptables mode does not work on this node: {problems}"


def test_log_lines_have_the_header_of_klog() -> None:
    done = run("render", f"--objects={CLUSTER}", "--hostname-override=of-no-node")
    warnings = [line for line in done.stderr.splitlines() if "no Node 'of-no-node'" in line]
    assert len(warnings) == 1
    assert HEADER.match(warnings[0])
    assert re.search(r"^W\d{4} .* one_shot\.py:\d+\] no Node 'of-no-node': ", warnings[0])


@pytest.mark.parametrize("source", ["flag", "file"])
def test_with_json_logging_every_line_is_json_including_the_final_error(source: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nudpIdleTimeout: 1s\n"
        + ("logging: {format: json}\n" if source == "file" else "")
    )
    flags = ["--logging-format=json"] if source == "flag" else []
    done = run("render", "--objects=/nonexistent", f"--config={file}", *flags)
    assert done.returncode == 1
    warning, failure = [json.loads(line) for line in done.stderr.splitlines()]
    assert warning["msg"].startswith(f"{file}:3: udpIdleTimeout: ")
    assert failure["msg"] == "/nonexistent: cannot be read: no such file or directory"
    assert (warning["v"], "v" in failure) == (0, False)


def test_unknown_field_is_a_warning_and_with_strict_config_an_error(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCidr: 10.0.0.0/8\n"
    file.write_text(text)
    problem = f"{file}:3: clusterCidr: unknown field; did you mean clusterCIDR?"
    for command in ("render", "apply", "run"):
        arguments = (command, "--objects=/nonexistent", f"--config={file}")
        strict = run(*arguments, "--strict-config")
        assert strict.returncode == 2
        assert error_line(strict) == f"kproxy: {problem}"
        lenient = run(*arguments, *(["--write-config-to=/dev/null"] if command == "run" else []))
        assert lenient.returncode == (0 if command == "run" else 1)
        assert f"] {problem} (ignored)\n" in lenient.stderr


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_render_warns_about_services_that_claim_the_same_frontend(tmp_path: Path, mode: str) -> None:
    two = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "demo"},
            "spec": {"clusterIP": address, "externalIPs": ["203.0.113.1"], "ports": [{"port": 80}]},
        }
        for name, address in (("a", "10.96.0.1"), ("b", "10.96.0.2"))
    ]
    file = tmp_path / "two.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": two}))
    done = run("render", f"--objects={file}", f"--proxy-mode={mode}", "--family=ipv4")
    assert done.returncode == 0
    assert "demo/b and demo/a both claim 203.0.113.1:80/TCP: traffic goes to demo/a only\n" in done.stderr


def test_render_prints_both_families_or_the_selected_one() -> None:
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


def test_closed_pipe_is_not_an_error() -> None:
    done = subprocess.run(
        f"{KPROXY} render --objects={GOLDEN}/random-11 | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "# IPv4: input for iptables-restore --noflush\n"
    assert "Error" not in done.stderr


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"kproxy {kproxy.__version__}\n"


def test_without_a_command_help_is_printed_to_stderr_with_exit_code_2() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == run("--help").stdout


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("run", "--help"), ("completion", "bash")])
def test_unwritable_standard_output_is_a_one_line_error(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([KPROXY, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert error_line(done) == "kproxy: cannot write to standard output: No space left on device"


def modules_after(*arguments: str) -> set[str]:
    """Return the names of the modules that a command line has loaded when it exits."""
    script = (
        "import sys, kproxy.__main__\n"
        "try:\n    kproxy.__main__.main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert "kproxy" in done.stdout
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [("--version",), ("--help",)])
def test_version_and_help_do_not_load_the_configuration_modules(arguments: tuple[str, ...]) -> None:
    loaded = modules_after(*arguments)
    assert "kproxy.cli.parser" in loaded
    assert loaded & {"kproxy.config", "kproxy.cli.run", "msgspec", "yaml", "logging", "difflib", "shtab"} == set()


def test_command_does_not_load_the_modules_of_other_commands() -> None:
    loaded = modules_after("run", "--help")
    assert "kproxy.config" in loaded
    assert loaded & {"kproxy.cli.render", "kproxy.cli.completion", "kproxy.app.daemon", "kubernetes", "shtab"} == set()
    assert "shtab" in modules_after("completion", "bash")


@pytest.mark.parametrize(("flag", "shown"), [("-v=0", "[40]"), ("-v=4", "[30, 40]")])
def test_warnings_of_the_http_library_are_logged_only_at_verbosity_4(flag: str, shown: str) -> None:
    program = """
import argparse, logging, sys
from kproxy.cli.options import load_settings
from kproxy.config import add_flags
parser = argparse.ArgumentParser()
add_flags(parser)
load_settings(parser.parse_args(sys.argv[1:]))
log = logging.getLogger("urllib3.connectionpool")
print([level for level in (logging.WARNING, logging.ERROR) if log.isEnabledFor(level)])
"""
    done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, check=True)
    assert done.stdout == f"{shown}\n"
