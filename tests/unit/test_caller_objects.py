"""The objects that the caller of `kubectl kproxy explain` may read, as they are passed on to the node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kproxy.cli.console import CannotTellError, UsageError
from kproxy.cli.explain import gather
from kproxy.cli.parser import parse
from kproxy.config import configure
from kproxy.diagnose.caller_objects import (
    MAX_BYTES,
    CallerObjects,
    CallerObjectsError,
    decode_objects,
    encode_objects,
)
from kproxy.diagnose.cluster_objects import cluster_objects
from tests.unit.explain_cases import BROKEN, PODS, SERVICE, SLICE, SOUND, SetUp, cluster

KINDS = ["Service", "EndpointSlice", "Node", "Pod", "NetworkPolicy"]


def found(text: str, *more: dict[str, Any]) -> CallerObjects:
    return CallerObjects("a test", [*yaml.safe_load_all(text), *more], KINDS)


@pytest.mark.parametrize("setup", [*BROKEN, *SOUND], ids=lambda setup: setup.name)
def test_no_field_that_matters_is_lost(setup: SetUp) -> None:
    before = found(setup.yaml)
    after = decode_objects(encode_objects(before, setup.key))
    assert after.objects is not None
    assert cluster_objects(after.objects, KINDS) == before.decoded()


def test_confidential_and_large_fields_are_not_passed_on() -> None:
    container = {
        "name": "api",
        "env": [{"name": "PASSWORD", "value": "secret-1"}],
        "args": ["--token=secret-2"],
        "readinessProbe": {"httpGet": {"httpHeaders": [{"name": "Authorization", "value": "secret-3"}]}},
        "ports": [{"containerPort": 8080, "name": "http"}],
    }
    metadata = {
        "name": "api-1",
        "namespace": "shop",
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "secret-4"},
        "managedFields": [{"manager": "secret-5"}],
    }
    pod = {"kind": "Pod", "metadata": metadata, "spec": {"containers": [container], "volumes": [{"name": "secret-6"}]}}
    node = {"kind": "Node", "metadata": {"name": "node-1"}, "status": {"images": [{"names": ["secret-7"]}]}}
    line = encode_objects(found(SERVICE, pod, node), "shop/api")
    assert b"secret" not in line
    decoded = decode_objects(line).decoded()
    assert decoded is not None
    assert decoded.pods is not None
    assert [each.name for each in decoded.pods[0].ports] == ["http"]
    assert (decoded.pods[0].spec.containers or [])[0].readiness_probe == {}


def test_the_largest_kinds_are_omitted_until_the_rest_fits() -> None:
    pods = [{"kind": "Pod", "metadata": {"name": f"pod-{each}", "namespace": "shop"}} for each in range(1000)]
    others = [{"kind": "Service", "metadata": {"name": f"other-{each}", "namespace": "x"}} for each in range(500)]
    many = found(cluster(SERVICE, SLICE, PODS), *pods, *others)
    assert decode_objects(encode_objects(many, "shop/api")).problems == []

    line = encode_objects(many, "shop/api", 50_000)
    assert len(line) <= 50_000
    without_pods = decode_objects(line)
    assert [each.partition(" ")[0] for each in without_pods.problems] == ["Pod"]
    decoded = without_pods.decoded()
    assert decoded is not None
    assert decoded.pods is None
    assert decoded.sees_all_services
    assert len(decoded.service_objects) == 501

    line = encode_objects(many, "shop/api", 6_000)
    assert len(line) <= 6_000
    decoded = decode_objects(line).decoded()
    assert decoded is not None
    assert [each.metadata.name for each in decoded.service_objects] == ["api"]
    assert not decoded.sees_all_services
    assert decoded.slices is not None

    nothing = decode_objects(encode_objects(many, "shop/api", 100))
    assert (nothing.objects, nothing.problems) == (None, ["Service shop/api is too large"])


@pytest.mark.parametrize("line", [b"", b"[]", b'{"source": 1}', b"\xff", b"[" * 100_000])
def test_other_texts_are_an_error(line: bytes) -> None:
    with pytest.raises(CallerObjectsError, match="not written by kubectl kproxy"):
        decode_objects(line)


def explain_file(path: Path, *flags: str) -> Any:
    options = parse(["explain", "shop/api", f"--cluster-objects={path}", "--kernel=false", *flags])
    return gather(options, configure(options)[0], "shop/api")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CannotTellError, match=r"cannot read .*No such file"):
        explain_file(tmp_path / "absent")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CannotTellError, match="has more than 16 MiB"):
        explain_file(large)
    other = tmp_path / "other"
    other.write_text(json.dumps({"kind": "List", "items": []}))
    with pytest.raises(CannotTellError, match="not written by kubectl kproxy"):
        explain_file(other)


def test_two_sources_of_objects_are_a_usage_error(tmp_path: Path) -> None:
    options = parse(["explain", "shop/api", "--cluster-objects=-", f"--objects={tmp_path}"])
    with pytest.raises(UsageError, match="--objects and --cluster-objects cannot be combined"):
        options.command(options)
