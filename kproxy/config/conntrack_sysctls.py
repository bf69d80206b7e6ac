"""Kernel parameters that the `conntrack` section of the configuration sets. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from kproxy.config.types import Conntrack

MAX = "proc/sys/net/netfilter/nf_conntrack_max"
HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
TCP_ESTABLISHED = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
TCP_CLOSE_WAIT = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait"
TCP_BE_LIBERAL = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal"
UDP = "proc/sys/net/netfilter/nf_conntrack_udp_timeout"
UDP_STREAM = "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream"

PARAMETERS = (MAX, HASH_SIZE, TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_BE_LIBERAL, UDP, UDP_STREAM)
"""The parameters whose current values `sysctl_changes` needs, as paths relative to `/`."""

ENTRIES_PER_BUCKET = 4
"""Target load of the hash table: kube-proxy sizes it at a quarter of `nf_conntrack_max`."""

MAX_FROM_CPUS = 1 << 20
"""Upper bound of `maxPerCore` times the number of CPUs, as in kube-proxy 1.36 (k/k#137002). `min` may exceed it."""


def sysctl_changes(config: Conntrack, cpus: int, current: Mapping[str, int]) -> dict[str, int]:
    """Return the value to write for each path, in the order in which to write them.

    `current` has the current values of the `PARAMETERS` that can be read; `cpus` is the number of CPUs. 0 in the
    configuration leaves a parameter unchanged. Timeouts, in seconds and rounded up, are written whenever they differ.
    The maximum and the hash table size are only ever raised: an administrator may have chosen the larger value, and
    lowering the maximum could leave the table full at once (k/k#142035).
    """
    limit = _max_entries(config, cpus)
    desired = {
        MAX: _raised(limit, current.get(MAX)),
        HASH_SIZE: _raised(limit // ENTRIES_PER_BUCKET, current.get(HASH_SIZE)),
        TCP_ESTABLISHED: ceil(config.tcp_established_timeout),
        TCP_CLOSE_WAIT: ceil(config.tcp_close_wait_timeout),
        TCP_BE_LIBERAL: int(config.tcp_be_liberal),
        UDP: ceil(config.udp_timeout),
        UDP_STREAM: ceil(config.udp_stream_timeout),
    }
    return {path: value for path, value in desired.items() if value and value != current.get(path)}


def _max_entries(config: Conntrack, cpus: int) -> int:
    """Return `nf_conntrack_max`, or 0 to leave it unchanged. `min` only applies together with `maxPerCore`."""
    return max(config.min, min(config.max_per_core * cpus, MAX_FROM_CPUS)) if config.max_per_core else 0


def _raised(desired: int, current: int | None) -> int:
    """Return `desired` if `current` is smaller or unknown, else 0 (unchanged)."""
    return desired if current is None or desired > current else 0
