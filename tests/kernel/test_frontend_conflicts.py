"""Real traffic to an address and port that two Services use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, Refused, send_request
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab

SHARED = {4: "203.0.113.7", 6: "2001:db8:7::7"}
CLUSTER_IPS = {"aaa": ("10.96.0.101", "fd00:10:96::101"), "bbb": ("10.96.0.102", "fd00:10:96::102")}
FAMILIES = {4: "IPv4", 6: "IPv6"}

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


class TwoServices:
    """Two Services, each with a pod of the same name."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, mode: str) -> None:
        self._lab, self._folder, self._mode = lab, folder, mode
        self._pods: dict[str, Host] = {}
        for number, name in enumerate(CLUSTER_IPS, 1):
            self._pods[name] = lab.add_pod(name, f"10.244.1.{number}", f"fd00:10:244:1::{number}")
            servers.serve(self._pods[name], 8080)
        self.client = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")

    def apply(self, serving: str, **specs: Any) -> None:
        """Program the Services in `specs`. Only those named in `serving` have their pod as an endpoint."""
        found = [objects.service(name, *CLUSTER_IPS[name], **spec) for name, spec in specs.items()]
        for name in serving.split():
            for version, family in FAMILIES.items():
                endpoint = objects.endpoint(self._pods[name].address(version), NODE)
                found.append(objects.endpoint_slice(name, [endpoint], family=family))
        objects.write(self._folder / "two.yaml", [objects.node(), *found])
        proxy.apply(self._lab, self._folder, mode_flag(self._mode))

    def answering_pod(self, address: str) -> str:
        """Return the name of the pod that answers on port 80, or "refused"."""
        outcome = send_request(self.client, address, 80)
        if outcome == Refused():
            return "refused"
        assert isinstance(outcome, Answered)
        return outcome.pod


@pytest.fixture
def services(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> TwoServices:
    return TwoServices(lab, servers, tmp_path, mode)


@BOTH_MODES
@VERSIONS
def test_first_service_by_name_owns_a_shared_external_ip(services: TwoServices, version: int) -> None:
    shared = {"externalIPs": [*SHARED.values()]}
    services.apply("bbb", bbb=shared)
    assert services.answering_pod(SHARED[version]) == "bbb"
    services.apply("aaa bbb", aaa=shared, bbb=shared)
    assert services.answering_pod(SHARED[version]) == "aaa"
    services.apply("bbb", aaa=shared, bbb=shared)
    assert services.answering_pod(SHARED[version]) == "bbb"
    services.apply("", aaa=shared, bbb=shared)
    assert services.answering_pod(SHARED[version]) == "refused"


@BOTH_MODES
@VERSIONS
def test_external_ip_cannot_take_over_a_cluster_ip(services: TwoServices, version: int) -> None:
    claimant = {"externalIPs": [*CLUSTER_IPS["bbb"]]}
    address = CLUSTER_IPS["bbb"][version == 6]
    services.apply("aaa bbb", aaa=claimant, bbb={})
    assert services.answering_pod(address) == "bbb"
    services.apply("aaa", aaa=claimant, bbb={})
    assert services.answering_pod(address) == "refused"
    services.apply("aaa", aaa=claimant)
    assert services.answering_pod(address) == "aaa"
