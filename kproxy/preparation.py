"""What a node needs besides rules: kernel parameters, and a process that survives a lack of memory."""

from __future__ import annotations

import logging
import os

from kproxy.config import Config
from kproxy.config.conntrack_limits import PARAMETERS, changes
from kproxy.contexts import localhost_node_ports
from kproxy.host.process import set_oom_score_adj
from kproxy.host.sysctl import ensure_route_localnet, read_parameters, write_parameters
from kproxy.model.types import Family

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
