"""The kernel parameters that the section `conntrack` asks for, and how they are written."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kproxy.config import conntrack_sysctls
from kproxy.config.types import Conntrack, Seconds
from kproxy.host.sysctl import ROUTE_LOCALNET, ensure_route_localnet, read_parameters, write_parameters

NOTHING = Conntrack(
    max_per_core=0, min=0, tcp_established_timeout=Seconds(0), tcp_close_wait_timeout=Seconds(0), tcp_be_liberal=False
)
KERNEL = {
    conntrack_sysctls.MAX: 65536,
    conntrack_sysctls.HASH_SIZE: 65536,
    conntrack_sysctls.TCP_ESTABLISHED: 432000,
    conntrack_sysctls.TCP_CLOSE_WAIT: 60,
    conntrack_sysctls.TCP_BE_LIBERAL: 0,
    conntrack_sysctls.UDP: 30,
    conntrack_sysctls.UDP_STREAM: 120,
}


def test_the_defaults_of_kube_proxy_on_a_kernel_of_its_own() -> None:
    assert conntrack_sysctls.sysctl_changes(Conntrack(), 8, KERNEL) == {
        conntrack_sysctls.MAX: 262144,
        conntrack_sysctls.TCP_ESTABLISHED: 86400,
        conntrack_sysctls.TCP_CLOSE_WAIT: 3600,
    }


@pytest.mark.parametrize(
    ("config", "cpus", "maximum"),
    [
        (Conntrack(max_per_core=1000, min=50), 4, 4000),
        (Conntrack(max_per_core=1000, min=5000), 4, 5000),
        (Conntrack(max_per_core=1000, min=0), 4, 4000),
        (Conntrack(max_per_core=0, min=5000), 4, None),
    ],
    ids=["scaled", "at-least-min", "no-min", "left-alone"],
)
def test_the_maximum_grows_with_the_cpus(config: Conntrack, cpus: int, maximum: int | None) -> None:
    assert conntrack_sysctls.sysctl_changes(config, cpus, {}).get(conntrack_sysctls.MAX) == maximum


@pytest.mark.parametrize(
    ("buckets", "written"),
    [
        ({conntrack_sysctls.HASH_SIZE: 100}, 1000),
        ({}, 1000),
        ({conntrack_sysctls.HASH_SIZE: 1000}, None),
        ({conntrack_sysctls.HASH_SIZE: 1001}, None),
    ],
    ids=["raised", "unknown", "enough", "never-lowered"],
)
def test_the_hash_table_has_a_bucket_for_four_entries(buckets: dict[str, int], written: int | None) -> None:
    changes = conntrack_sysctls.sysctl_changes(Conntrack(max_per_core=1000, min=0), 4, buckets)
    assert changes.get(conntrack_sysctls.HASH_SIZE) == written


def test_nothing_asked_for_is_nothing_written() -> None:
    assert conntrack_sysctls.sysctl_changes(NOTHING, 8, KERNEL) == {}
    assert conntrack_sysctls.sysctl_changes(NOTHING, 8, {}) == {}


def test_what_is_right_already_is_not_written() -> None:
    config = Conntrack(tcp_be_liberal=True, udp_timeout=Seconds(10), udp_stream_timeout=Seconds(20))
    first = conntrack_sysctls.sysctl_changes(config, 8, KERNEL)
    assert [
        first[path] for path in (conntrack_sysctls.TCP_BE_LIBERAL, conntrack_sysctls.UDP, conntrack_sysctls.UDP_STREAM)
    ] == [1, 10, 20]
    assert conntrack_sysctls.sysctl_changes(config, 8, KERNEL | first) == {}


@pytest.mark.parametrize(("current", "written"), [(131071, 131072), (131072, None), (131073, None), (1 << 22, None)])
def test_a_maximum_that_is_larger_is_left_alone(current: int, written: int | None) -> None:
    assert (
        conntrack_sysctls.sysctl_changes(Conntrack(), 1, KERNEL | {conntrack_sysctls.MAX: current}).get(
            conntrack_sysctls.MAX
        )
        == written
    )


@pytest.mark.parametrize(
    ("config", "cpus", "maximum"),
    [
        (Conntrack(), 31, 31 * 32768),
        (Conntrack(), 32, 1048576),
        (Conntrack(), 33, 1048576),
        (Conntrack(), 512, 1048576),
        (Conntrack(max_per_core=131072), 16, 1048576),
        (Conntrack(min=2000000), 512, 2000000),
    ],
)
def test_many_cpus_do_not_ask_for_more_than_a_million(config: Conntrack, cpus: int, maximum: int) -> None:
    found = conntrack_sysctls.sysctl_changes(config, cpus, KERNEL)
    assert (found[conntrack_sysctls.MAX], found[conntrack_sysctls.HASH_SIZE]) == (maximum, maximum // 4)


def test_a_fraction_of_a_second_does_not_become_never() -> None:
    config = Conntrack(udp_timeout=Seconds(0.25), udp_stream_timeout=Seconds(1.5))
    changes = conntrack_sysctls.sysctl_changes(config, 1, KERNEL)
    assert (changes[conntrack_sysctls.UDP], changes[conntrack_sysctls.UDP_STREAM]) == (1, 2)


# Writing. The root is a folder: these are parameters of the whole machine.


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for path, value in KERNEL.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return tmp_path


def test_parameters_are_read_computed_and_written(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = Conntrack(max_per_core=100000, tcp_be_liberal=True)
    changes = conntrack_sysctls.sysctl_changes(config, 4, read_parameters(conntrack_sysctls.PARAMETERS, machine))
    assert write_parameters(changes, machine) == []
    assert read_parameters(conntrack_sysctls.PARAMETERS, machine) == KERNEL | {
        conntrack_sysctls.MAX: 400000,
        conntrack_sysctls.HASH_SIZE: 100000,
        conntrack_sysctls.TCP_ESTABLISHED: 86400,
        conntrack_sysctls.TCP_CLOSE_WAIT: 3600,
        conntrack_sysctls.TCP_BE_LIBERAL: 1,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "set sysctl net.netfilter.nf_conntrack_max: 65536 -> 400000",
        "set /sys/module/nf_conntrack/parameters/hashsize: 65536 -> 100000",
        "set sysctl net.netfilter.nf_conntrack_tcp_timeout_established: 432000 -> 86400",
        "set sysctl net.netfilter.nf_conntrack_tcp_timeout_close_wait: 60 -> 3600",
        "set sysctl net.netfilter.nf_conntrack_tcp_be_liberal: 0 -> 1",
    ]


def test_a_parameter_that_is_missing_is_told_and_the_others_are_written(machine: Path) -> None:
    (machine / conntrack_sysctls.MAX).unlink()
    (machine / conntrack_sysctls.UDP).write_text("not a number")
    found = read_parameters(conntrack_sysctls.PARAMETERS, machine)
    assert found == {
        path: value for path, value in KERNEL.items() if path not in {conntrack_sysctls.MAX, conntrack_sysctls.UDP}
    }
    problems = write_parameters({conntrack_sysctls.MAX: 1, conntrack_sysctls.UDP: 2}, machine)
    assert problems == ["cannot set /proc/sys/net/netfilter/nf_conntrack_max to 1: No such file or directory"]
    assert (machine / conntrack_sysctls.UDP).read_text() == "2"
    assert not (machine / conntrack_sysctls.MAX).exists()


def test_a_parameter_without_a_value_that_can_be_read_is_logged_as_such(
    machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (machine / conntrack_sysctls.UDP).write_text("not a number")
    assert write_parameters({conntrack_sysctls.UDP: 2}, machine) == []
    assert caplog.messages == ["set sysctl net.netfilter.nf_conntrack_udp_timeout: unknown -> 2"]


def test_route_localnet_is_set_where_it_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert ensure_route_localnet(tmp_path) == [f"cannot set /{ROUTE_LOCALNET} to 1: No such file or directory"]
    file = tmp_path / ROUTE_LOCALNET
    file.parent.mkdir(parents=True)
    file.write_text("0\n")
    assert ensure_route_localnet(tmp_path) == []
    assert file.read_text() == "1"
    os.utime(file, (0, 0))
    assert ensure_route_localnet(tmp_path) == []
    assert file.stat().st_mtime == 0
    assert caplog.messages == ["set sysctl net.ipv4.conf.all.route_localnet: 0 -> 1"]
