"""The workflows in .github are valid, run targets that exist, and cover all proxy modes."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from kproxy.config.types import Mode

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CI = ROOT / ".github/workflows/ci.yml"
EACH = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)

RELEASE = re.compile(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+")
NODE_IMAGE = re.compile(r"kindest/node:v(\d+\.\d+)\.\d+@sha256:[0-9a-f]{64}")
MAKE = re.compile(r"(?<![\w-])make ((?:[a-z][a-z-]*(?: |$))+)", re.MULTILINE)


def workflow(path: Path) -> Any:
    # YAML 1.1 parses the key `on` as true; no test reads it.
    return yaml.safe_load(path.read_text())


def jobs(path: Path) -> dict[str, Any]:
    by_name: dict[str, Any] = workflow(path)["jobs"]
    return by_name


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def targets(path: Path) -> set[str]:
    """Return the make targets that the steps of a workflow run."""
    scripts = [step["run"] for step in steps(path) if "run" in step]
    return {target for script in scripts for targets in MAKE.findall(script) for target in targets.split()}


def check(path: Path) -> subprocess.CompletedProcess[str]:
    """Validate a workflow against the schema included in check-jsonschema, without network access."""
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_there_are_workflows() -> None:
    assert CI in WORKFLOWS


@EACH
def test_schema(path: Path) -> None:
    done = check(path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("runs-on:", "run-on:"),
        ("contents: read", "contents: reed"),
        ("timeout-minutes: 60", "timeout-minutes: soon"),
        ("fail-fast: false", "fail-fast: [false]"),
        ("    steps:", "    step:"),
    ],
)
def test_schema_rejects_a_broken_workflow(text: str, instead: str, tmp_path: Path) -> None:
    content = CI.read_text()
    assert text in content
    broken = tmp_path / "ci.yml"
    broken.write_text(content.replace(text, instead))
    assert check(broken).returncode == 1


@EACH
def test_permissions_are_read_only(path: Path) -> None:
    assert workflow(path)["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs(path).items() if "permissions" in job] == []
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@EACH
def test_actions_are_pinned_to_a_release(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert [action for action in used if not RELEASE.fullmatch(action)] == []


@EACH
def test_newer_commit_cancels_older_runs(path: Path) -> None:
    concurrency = workflow(path)["concurrency"]
    assert concurrency["cancel-in-progress"] is True
    assert "github.ref" in concurrency["group"]


@EACH
def test_every_job_has_a_timeout_and_uploads_logs_on_failure(path: Path) -> None:
    for name, job in jobs(path).items():
        assert 0 < job["timeout-minutes"] <= 60
        if name == "audit":
            continue  # its only output is in the log of the job
        assert job["strategy"]["fail-fast"] is False
        last = job["steps"][-1]
        assert last["uses"].startswith("actions/upload-artifact@")
        assert last["if"] == "${{ failure() }}"
        assert "matrix." in last["with"]["name"], "each job of a matrix needs its own artifact name"


@EACH
def test_steps_run_in_bash_so_that_pipefail_is_set(path: Path) -> None:
    assert workflow(path)["defaults"]["run"]["shell"] == "bash"
    assert [step["name"] for step in steps(path) if "shell" in step] == []


def test_make_targets_exist() -> None:
    existing = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set().union(*map(targets, WORKFLOWS)) <= existing


def test_ci_checks_tests_and_runs_the_demo_and_a_cluster() -> None:
    assert targets(CI) == {"check", "test", "audit", "demo", "packages", "kind-up", "kind-test"}


def test_dependencies_are_audited_for_every_change_and_every_week() -> None:
    text = CI.read_text()
    assert re.search(r"^  schedule:\n    - cron: ", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    audit = makefile[makefile.index("\naudit:") :].split("\n\n")[0]
    for pinned in ("deploy/image/requirements.txt", "deploy/image/build-requirements.txt", "constraints.txt"):
        assert f"-r {pinned}" in audit
    assert audit.count("--strict") == audit.count("bin/pip-audit ") == 2
    assert re.search(r"^PIP_AUDIT := pip-audit==[\d.]+$", makefile, re.MULTILINE)


def test_demo_and_tests_run_on_debian_and_ubuntu_with_privileges() -> None:
    job = jobs(CI)["test"]
    images = [entry["image"] for entry in job["strategy"]["matrix"]["include"]]
    assert images == ["debian:bookworm", "debian:trixie", "ubuntu:24.04"]
    assert job["container"]["image"] == "${{ matrix.image }}"
    assert "--privileged" in job["container"]["options"].split()


def test_clusters_cover_every_proxy_mode_and_several_kubernetes_versions() -> None:
    job = jobs(CI)["kind"]
    matrix = job["strategy"]["matrix"]
    assert matrix["mode"] == list(get_args(Mode))
    assert len(matrix["kubernetes"]) >= 3
    for entry in matrix["kubernetes"]:
        image = NODE_IMAGE.fullmatch(entry["image"])
        assert image is not None, entry
        assert image[1] == entry["version"]
    assert job["env"]["MODE"] == "${{ matrix.mode }}"
    assert job["env"]["NODE_IMAGE"] == "${{ matrix.kubernetes.image }}"
    overridable = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(job["env"]) <= overridable, "the Makefile ignores other variables"
