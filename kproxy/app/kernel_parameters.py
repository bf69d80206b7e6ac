"""Set the kernel parameters and process settings that the node needs in addition to rules."""

from __future__ import annotations

import logging
import os

from kproxy.app.node_port_addresses import localhost_node_ports
from kproxy.config import Config
from kproxy.config.conntrack_sysctls import PARAMETERS, sysctl_changes
from kproxy.host.process import set_oom_score_adj
from kproxy.host.sysctl import ensure_route_localnet, read_parameters, write_parameters
from kproxy.model.types import Family

log = logging.getLogger(__name__)


def prepare_process(config: Config) -> None:
    """Set `oomScoreAdj`. A failure is logged and otherwise ignored."""
    try:
        set_oom_score_adj(config.oom_score_adj)
    except OSError as error:
        log.warning("cannot set oomScoreAdj to %d: %s", config.oom_score_adj, error.strerror)


def prepare_conntrack(config: Config) -> None:
    """Set the parameters of the `conntrack` section. Failures are logged and otherwise ignored."""
    changes = sysctl_changes(config.conntrack, os.cpu_count() or 1, read_parameters(PARAMETERS))
    for problem in write_parameters(changes):
        log.warning("%s", problem)


def prepare_localhost_node_ports(config: Config) -> None:
    """Set `route_localnet` if NodePorts must be reachable on 127.0.0.1. Failures are logged and otherwise ignored.

    Call this only if the rule that protects 127.0.0.1 from the network (CVE-2020-8558) is active or will be active
    soon.
    """
    if localhost_node_ports(config, Family.IPV4):
        for problem in ensure_route_localnet():
            log.warning("NodePorts do not answer on 127.0.0.1: %s", problem)
