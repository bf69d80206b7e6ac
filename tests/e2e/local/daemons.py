"""A real `kproxy run` on every node, started, stopped and reconfigured as kubelet and operators do."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError

from tests.apiserver import ApiServer, Relay
from tests.e2e.cluster import Mode
from tests.e2e.local.requests import get
from tests.lab.modes import mode_flag, no_rules_of_other_mode
from tests.lab.namespace import Namespace
from tests.lab.proxy import CLUSTER_CIDR, KPROXY
from tests.lab.topology import Host
from tests.lab.waiting import HANG_GUARD, wait_until

LAST_LINES = 30
HEALTHZ = "http://127.0.0.1:10256/healthz"
PROXY_MODE = "http://127.0.0.1:10249/proxyMode"


class NodeProxy:
    """kproxy on one node. It reaches the API server through a relay on the node's loopback."""

    def __init__(self, node: Host, server: ApiServer, folder: Path) -> None:
        self._node = node
        self._relay = Relay(server.address, listen=lambda port: _listen(node.namespace, port))
        self._log = folder / f"{node.name}.log"
        kubeconfig = server.kubeconfig(folder / f"{node.name}.kubeconfig", port=self._relay.port)
        self._command = [
            KPROXY,
            "run",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={node.name}",
            f"--cluster-cidr={CLUSTER_CIDR}",
            "--iptables-min-sync-period=50ms",  # the default of 1 s would slow down the tests
            "--conntrack-max-per-core=0",  # a setting of the whole machine
            "--conntrack-min=0",
        ]
        self._process: subprocess.Popen[str] | None = None

    def start(self, mode: Mode) -> None:
        """Start kproxy. Does not wait."""
        with self._log.open("a") as output:
            self._process = self._node.namespace.popen([*self._command, mode_flag(mode)], output)

    def stop(self, number: int) -> None:
        """Stop kproxy with a signal; return once it has exited."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(HANG_GUARD)

    def wait_until_healthy(self) -> None:
        """Return once /healthz reports success. Raises `RuntimeError` with the end of its log if kproxy exits."""
        wait_until(self._is_healthy, f"kproxy on {self._node.name} is healthy")

    def mode(self) -> Mode:
        """Return the mode from /proxyMode."""
        return "nftables" if get(self._node, PROXY_MODE)[1] == "nftables" else "iptables"

    def has_only_rules_of(self, mode: Mode) -> bool:
        """Return whether the node has no rules of the other mode."""
        return no_rules_of_other_mode(self._node.namespace, mode)

    def log_tail(self, lines: int = LAST_LINES) -> str:
        """Return the last lines of the log."""
        return "\n".join(self._log.read_text().splitlines()[-lines:])

    def close(self) -> None:
        """Kill kproxy."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(HANG_GUARD)
        self._relay.refuse()

    def _is_healthy(self) -> bool:
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"kproxy on {self._node.name} exited with code {code}: {self.log_tail()}")
        try:
            return get(self._node, HEALTHZ)[0] == 200
        except URLError:
            return False


class LocalProxies:
    """kproxy on all nodes, in one mode."""

    def __init__(self, proxies: Mapping[str, NodeProxy], mode: Mode) -> None:
        """Start kproxy on all nodes; return once it is healthy on all."""
        self._proxies = proxies
        self._mode = mode
        self._start(proxies.values())

    def mode(self) -> Mode:
        """Return the proxy mode of all nodes."""
        (mode,) = {proxy.mode() for proxy in self._proxies.values()}
        return mode

    def restart(self, node: str) -> None:
        """Stop the proxy of a node as an upgrade does; return once a new one is ready."""
        self._replace(node, signal.SIGTERM)

    def kill(self, node: str) -> None:
        """Kill the proxy of a node with SIGKILL; return once a new one is ready."""
        self._replace(node, signal.SIGKILL)

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Switch all nodes to a mode for the body of a `with` statement, and back afterwards."""
        before = self._mode
        self._switch(mode)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def replaced_by_kube_proxy(self) -> Iterator[None]:
        """Raise `NotImplementedError`: the emulated cluster has no kube-proxy."""
        raise NotImplementedError("the emulated cluster has no kube-proxy")
        yield

    def log_tail(self) -> str:
        """Return the last lines of all logs."""
        return "\n".join(f"--- kproxy on {name}\n{proxy.log_tail()}" for name, proxy in self._proxies.items())

    def close(self) -> None:
        """Kill kproxy on all nodes."""
        for proxy in self._proxies.values():
            proxy.close()

    def _replace(self, node: str, number: int) -> None:
        proxy = self._proxies[node]
        proxy.stop(number)
        self._start([proxy])

    def _switch(self, mode: Mode) -> None:
        """Switch node by node, as a rollout of a DaemonSet does."""
        if mode == self._mode:
            return
        self._mode = mode
        for name, proxy in self._proxies.items():
            self.restart(name)
            wait_until(partial(proxy.has_only_rules_of, mode), f"no rules of the previous mode on {name}")

    def _start(self, proxies: Iterable[NodeProxy]) -> None:
        for proxy in proxies:
            proxy.start(self._mode)
        for proxy in proxies:
            proxy.wait_until_healthy()


def _listen(node: Namespace, port: int) -> socket.socket:
    return node.call(lambda: socket.create_server(("127.0.0.1", port), backlog=64))
