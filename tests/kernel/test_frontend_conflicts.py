"""Real packets to an address and port that two Services claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, Refused, ask
from tests.lab.modes import BOTH_MODES, flag
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab

SHARED = {4: "203.0.113.7", 6: "2001:db8:7::7"}
CLUSTER_IPS = {"aaa": ("10.96.0.101", "fd00:10:96::101"), "bbb": ("10.96.0.102", "fd00:10:96::102")}
FAMILIES = {4: "IPv4", 6: "IPv6"}

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


class Two:
    """Two Services, each with a pod of its name."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, mode: str) -> None:
        self._lab, self._folder, self._mode = lab, folder, mode
        self._pods: dict[str, Host] = {}
        for number, name in enumerate(CLUSTER_IPS, 1):
            self._pods[name] = lab.add_pod(name, f"10.244.1.{number}", f"fd00:10:244:1::{number}")
            servers.serve(self._pods[name], 8080)
        self.client = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")

    def apply(self, serving: str, **specs: Any) -> None:
        """Program the Services named in `specs`, of which those named in `serving` have their pod."""
        found = [objects.service(name, *CLUSTER_IPS[name], **spec) for name, spec in specs.items()]
        for name in serving.split():
            for version, family in FAMILIES.items():
                endpoint = objects.endpoint(self._pods[name].address(version), NODE)
                found.append(objects.endpoint_slice(name, [endpoint], family=family))
        objects.write(self._folder / "two.yaml", [objects.node(), *found])
        proxy.apply(self._lab, self._folder, flag(self._mode))

    def answers(self, address: str) -> str:
        """Return which pod answers at port 80, "refused" if none may."""
        outcome = ask(self.client, address, 80)
        if outcome == Refused():
            return "refused"
        assert isinstance(outcome, Answered)
        return outcome.pod


@pytest.fixture
def two(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> Two:
    return Two(lab, servers, tmp_path, mode)


@BOTH_MODES
@VERSIONS
def test_an_external_ip_that_two_services_have(two: Two, version: int) -> None:
    shared = {"externalIPs": [*SHARED.values()]}
    two.apply("bbb", bbb=shared)
    assert two.answers(SHARED[version]) == "bbb"
    two.apply("aaa bbb", aaa=shared, bbb=shared)
    assert two.answers(SHARED[version]) == "aaa"
    two.apply("bbb", aaa=shared, bbb=shared)
    assert two.answers(SHARED[version]) == "bbb"
    two.apply("", aaa=shared, bbb=shared)
    assert two.answers(SHARED[version]) == "refused"


@BOTH_MODES
@VERSIONS
def test_a_cluster_ip_cannot_be_taken_over_by_an_external_ip(two: Two, version: int) -> None:
    thief = {"externalIPs": [*CLUSTER_IPS["bbb"]]}
    address = CLUSTER_IPS["bbb"][version == 6]
    two.apply("aaa bbb", aaa=thief, bbb={})
    assert two.answers(address) == "bbb"
    two.apply("aaa", aaa=thief, bbb={})
    assert two.answers(address) == "refused"
    two.apply("aaa", aaa=thief)
    assert two.answers(address) == "aaa"
