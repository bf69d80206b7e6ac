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
"""The parameters that `sysctl_changes` compares with the configuration, as paths relative to `/`."""

ENTRIES_PER_BUCKET = 4
"""Ratio of `nf_conntrack_max` to the number of hash table buckets, as in kube-proxy."""

MAX_FROM_CPUS = 1 << 20
"""Upper bound for the product of `maxPerCore` and the number of CPUs, as in kube-proxy 1.36 (k/k#137002).

`min` may be larger than this bound.
"""


def sysctl_changes(config: Conntrack, cpus: int, current: Mapping[str, int]) -> dict[str, int]:
    """Return a dict that maps paths to the values to write, in the order in which to write them.

    `current` contains the current value of each parameter in `PARAMETERS` that can be read. `cpus` is the number of
    CPUs. If the configuration says 0 or false, the parameter is left unchanged.

    A timeout (in seconds, rounded up) is written if it differs from the current value. `nf_conntrack_max` and the hash
    table size are raised but never lowered, for two reasons: an administrator may have chosen the larger value, and the
    table could already contain more entries than the lower maximum allows (k/k#142035).
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
    """Return the desired `nf_conntrack_max`, or 0 to leave it unchanged. If `maxPerCore` is 0, `min` has no effect."""
    return max(config.min, min(config.max_per_core * cpus, MAX_FROM_CPUS)) if config.max_per_core else 0


def _raised(desired: int, current: int | None) -> int:
    """Return `desired` if `current` is smaller or unknown. Otherwise, return 0 to leave the parameter unchanged."""
    return desired if current is None or desired > current else 0
