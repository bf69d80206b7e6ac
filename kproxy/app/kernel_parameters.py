"""Kernel parameters and process settings that the node needs besides rules."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from math import ceil

from kproxy.app.contexts import localhost_node_ports
from kproxy.config import Config
from kproxy.config.types import Conntrack
from kproxy.host.process import set_oom_score_adj
from kproxy.host.sysctl import ensure_route_localnet, read_parameters, write_parameters
from kproxy.model.types import Family

MAX = "proc/sys/net/netfilter/nf_conntrack_max"
HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
TCP_ESTABLISHED = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
TCP_CLOSE_WAIT = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait"
TCP_BE_LIBERAL = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal"
UDP = "proc/sys/net/netfilter/nf_conntrack_udp_timeout"
UDP_STREAM = "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream"
PARAMETERS = (MAX, HASH_SIZE, TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_BE_LIBERAL, UDP, UDP_STREAM)
"""What `changes` wants to know the values of, as paths below the root of the file system."""
ENTRIES_PER_BUCKET = 4
"""How full kube-proxy lets the hash table become: it keeps a quarter of `nf_conntrack_max` buckets."""


MOST_PER_CORES = 1 << 20
"""The most that `maxPerCore` times the CPUs comes to, as in kube-proxy 1.36 (k/k#137002); `min` may ask for more."""


def changes(config: Conntrack, cpus: int, current: Mapping[str, int]) -> dict[str, int]:
    """Return the values to write, in this order, by their paths.

    `current` holds the values of those `PARAMETERS` that can be read; `cpus` counts this machine's. 0 in the
    configuration leaves what the kernel has. Timeouts that differ are set, up or down. The maximum and the size of the
    hash table are only raised: somebody chose the larger value, and lowering it could make the table full at once
    (k/k#142035).
    """
    limit = _max(config, cpus)
    wanted = {
        MAX: _raised(limit, current.get(MAX)),
        HASH_SIZE: _raised(limit // ENTRIES_PER_BUCKET, current.get(HASH_SIZE)),
        TCP_ESTABLISHED: ceil(config.tcp_established_timeout),
        TCP_CLOSE_WAIT: ceil(config.tcp_close_wait_timeout),
        TCP_BE_LIBERAL: int(config.tcp_be_liberal),
        UDP: ceil(config.udp_timeout),
        UDP_STREAM: ceil(config.udp_stream_timeout),
    }
    return {path: value for path, value in wanted.items() if value and value != current.get(path)}


def _max(config: Conntrack, cpus: int) -> int:
    """Return how many entries there may be at most; without `maxPerCore`, `min` means nothing either."""
    return max(config.min, min(config.max_per_core * cpus, MOST_PER_CORES)) if config.max_per_core else 0


def _raised(wanted: int, current: int | None) -> int:
    """Return the value to set, or 0 to leave what there is."""
    return wanted if current is None or wanted > current else 0


log = logging.getLogger(__name__)


def prepare_process(config: Config) -> None:
    """Set the process's `oomScoreAdj`; what cannot be set is logged and done without."""
    try:
        set_oom_score_adj(config.oom_score_adj)
    except OSError as error:
        log.warning("oomScoreAdj stays as it is: %s", error.strerror)


def prepare_conntrack(config: Config) -> None:
    """Set the parameters of section `conntrack`; what cannot be set is logged and done without."""
    wanted = changes(config.conntrack, os.cpu_count() or 1, read_parameters(PARAMETERS))
    for problem in write_parameters(wanted):
        log.warning("%s", problem)


def prepare_localhost_node_ports(config: Config) -> None:
    """Let NodePorts answer on 127.0.0.1, if they are to; what cannot be set is logged and done without.

    To be called once the rule is in place that keeps neighbours from 127.0.0.1 (or by somebody who sets it up).
    """
    if localhost_node_ports(config, Family.IPV4):
        for problem in ensure_route_localnet():
            log.warning("NodePorts do not answer on 127.0.0.1: %s", problem)
