"""Fixtures of these tests."""

from __future__ import annotations

import shutil

import pytest

from tests.deploy.rendered import kubectl_problem
from tests.lab.requirements import missing_commands, missing_privilege

PROGRAMS = ("kubectl", "nft", "openssl")


@pytest.fixture(scope="session")
def machine() -> None:
    """Skip the test if this machine cannot run the cluster."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)} not found")
    if reason := kubectl_problem() or missing_commands() or missing_privilege():
        pytest.skip(reason)
