"""Kernel parameters of the configuration section `conntrack`, and reading and writing of kernel parameters."""

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


def test_default_configuration_on_a_kernel_with_default_parameters() -> None:
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
def test_maximum_scales_with_the_number_of_cpus(config: Conntrack, cpus: int, maximum: int | None) -> None:
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
def test_hash_table_has_one_bucket_per_four_entries(buckets: dict[str, int], written: int | None) -> None:
    changes = conntrack_sysctls.sysctl_changes(Conntrack(max_per_core=1000, min=0), 4, buckets)
    assert changes.get(conntrack_sysctls.HASH_SIZE) == written


def test_zero_configuration_changes_nothing() -> None:
    assert conntrack_sysctls.sysctl_changes(NOTHING, 8, KERNEL) == {}
    assert conntrack_sysctls.sysctl_changes(NOTHING, 8, {}) == {}


def test_parameters_with_the_configured_values_are_not_written() -> None:
    config = Conntrack(tcp_be_liberal=True, udp_timeout=Seconds(10), udp_stream_timeout=Seconds(20))
    first = conntrack_sysctls.sysctl_changes(config, 8, KERNEL)
    assert [
        first[path] for path in (conntrack_sysctls.TCP_BE_LIBERAL, conntrack_sysctls.UDP, conntrack_sysctls.UDP_STREAM)
    ] == [1, 10, 20]
    assert conntrack_sysctls.sysctl_changes(config, 8, KERNEL | first) == {}


@pytest.mark.parametrize(("current", "written"), [(131071, 131072), (131072, None), (131073, None), (1 << 22, None)])
def test_larger_maximum_is_not_lowered(current: int, written: int | None) -> None:
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
def test_scaled_maximum_is_limited_to_1048576(config: Conntrack, cpus: int, maximum: int) -> None:
    changes = conntrack_sysctls.sysctl_changes(config, cpus, KERNEL)
    assert (changes[conntrack_sysctls.MAX], changes[conntrack_sysctls.HASH_SIZE]) == (maximum, maximum // 4)


def test_fractional_timeouts_are_rounded_up() -> None:
    config = Conntrack(udp_timeout=Seconds(0.25), udp_stream_timeout=Seconds(1.5))
    changes = conntrack_sysctls.sysctl_changes(config, 1, KERNEL)
    assert (changes[conntrack_sysctls.UDP], changes[conntrack_sysctls.UDP_STREAM]) == (1, 2)


# Reading and writing, in a temporary directory instead of /: the real parameters affect the whole machine.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory that has the files of all parameters."""
    for path, value in KERNEL.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return tmp_path


def test_parameters_are_read_computed_and_written(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = Conntrack(max_per_core=100000, tcp_be_liberal=True)
    changes = conntrack_sysctls.sysctl_changes(config, 4, read_parameters(conntrack_sysctls.PARAMETERS, root))
    assert write_parameters(changes, root) == []
    assert read_parameters(conntrack_sysctls.PARAMETERS, root) == KERNEL | {
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


def test_missing_parameter_is_reported_and_the_others_are_written(root: Path) -> None:
    (root / conntrack_sysctls.MAX).unlink()
    (root / conntrack_sysctls.UDP).write_text("not a number")
    values = read_parameters(conntrack_sysctls.PARAMETERS, root)
    assert values == {
        path: value for path, value in KERNEL.items() if path not in {conntrack_sysctls.MAX, conntrack_sysctls.UDP}
    }
    problems = write_parameters({conntrack_sysctls.MAX: 1, conntrack_sysctls.UDP: 2}, root)
    assert problems == ["cannot set /proc/sys/net/netfilter/nf_conntrack_max to 1: No such file or directory"]
    assert (root / conntrack_sysctls.UDP).read_text() == "2"
    assert not (root / conntrack_sysctls.MAX).exists()


def test_unreadable_previous_value_is_logged_as_unknown(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (root / conntrack_sysctls.UDP).write_text("not a number")
    assert write_parameters({conntrack_sysctls.UDP: 2}, root) == []
    assert caplog.messages == ["set sysctl net.netfilter.nf_conntrack_udp_timeout: unknown -> 2"]


def test_route_localnet_is_set_only_if_it_is_not_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
