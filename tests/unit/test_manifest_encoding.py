"""The manifests that kproxy writes decode to the same objects."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.kube.manifests.encode import node_manifest, service_manifest, slice_manifest
from kproxy.kube.manifests.parse import parse_file
from kproxy.model.delta import Object
from kproxy.model.types import Node
from tests.unit.strategies import endpoint_slices, nodes, services


def decoded(manifest: dict[str, Any]) -> Object | None:
    found = parse_file("objects.yaml", yaml.safe_dump(manifest).encode())
    assert not found.problems
    assert not found.invalid
    ((_, each),) = found.objects
    return each


@given(services())
def test_services(service: Any) -> None:
    node_ports = [(port.protocol, port.node_port) for port in service.ports if port.node_port]
    assume(len(node_ports) == len({*node_ports}))
    if not (service.external_local and (service.vips or service.health_check_node_port)):
        service = replace(service, health_check_node_port=0)

    assert decoded(service_manifest(service)) == service


@given(endpoint_slices())
def test_endpoint_slices(endpoint_slice: Any) -> None:
    assert decoded(slice_manifest(endpoint_slice)) == endpoint_slice


@given(nodes(), st.booleans(), st.sampled_from([(), ("10.244.1.0/24", "fd00:10:244:1::/64")]))
def test_nodes(node: Node, being_deleted: bool, pod_cidrs: tuple[str, ...]) -> None:
    node = replace(node, being_deleted=being_deleted, pod_cidrs=pod_cidrs, uid="1234")
    assert decoded(node_manifest(node)) == node
