"""Judge the access to the API server, the clock, the Node's name and addresses, and the ports of kproxy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network

from kproxy.diagnose.facts import ApiFacts, HostFacts
from kproxy.diagnose.finding import Finding, error, info, passed, warning

CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 10.0, 300.0
"""How far the clock may be off for a warning, and for an error: certificates and tokens may then be rejected."""
_CLUSTER_NAMES = ("kubernetes.default", "kubernetes.default.svc")


def check_cluster(facts: HostFacts) -> Iterator[Finding]:
    """Yield the findings about the API server, the Node and the ports."""
    yield from _api(facts)
    yield from _clock(facts.api)
    yield from _node(facts)
    yield from _local_traffic(facts)
    yield from _ports(facts)


def _api(facts: HostFacts) -> Iterator[Finding]:
    api = facts.api
    if not api.source:
        yield info(
            "APIServerNotConfigured",
            "the API server and the Node were not checked: no kubeconfig is configured",
            "repeat the command with kproxy's flags: --config, --kubeconfig or --master",
        )
        return
    where = f"{api.server} ({api.source})" if api.server and api.server != api.source else api.server or api.source
    trap = _service_ip(api)
    if trap:
        yield error(
            "APIServerThroughService",
            f"{api.server or api.host} {trap}: it works only while a proxy runs, so kproxy cannot start after a reboot",
            "configure the real address of the API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT in the "
            "DaemonSet, or a kubeconfig",
        )
    if not api.answered:
        yield from _no_answer(api, where, explained=bool(trap))
        return
    if api.denied:
        yield error(
            "APIAccessDenied",
            f"{where} denied {', '.join(api.denied)}",
            "bind the ClusterRole system:node-proxier or the one in deploy/ to this user, or renew its credentials",
        )
    elif api.failed:
        yield error(
            "APIServerFails",
            f"{where} answers, but not as an API server should: {', '.join(api.failed)}",
            "check that the address is that of the API server, and that the server is healthy",
        )
    elif not trap:
        yield passed("APIServerReachable", f"{where} answers and permits what kproxy needs")


def _no_answer(api: ApiFacts, where: str, *, explained: bool) -> Iterator[Finding]:
    """Judge why there was no answer. `explained` is true if another finding has the reason."""
    if not api.server:
        yield error(
            "APIConfigurationInvalid",
            api.problem if api.problem.startswith(api.source) else f"{api.source}: {api.problem}",
            "correct the kubeconfig; in a Pod, mount the token of its service account",
        )
    elif explained:
        return
    elif api.slow:
        yield warning(
            "APIServerSlow",
            f"{where}: {api.problem}; the Node and the permissions were not checked",
            "repeat the command; if the server stays slow, check its load and the network",
        )
    else:
        yield error(
            "APIServerUnreachable",
            f"{where}: {api.problem}",
            "check the address, firewalls and the server's certificate; kproxy keeps existing rules meanwhile",
        )


def _service_ip(api: ApiFacts) -> str:
    """Return why the configured API server is probably the Service `kubernetes` itself, or ""."""
    if api.host in _CLUSTER_NAMES or api.host.startswith("kubernetes.default.svc."):
        return "is the name of the Service kubernetes"
    if _same_address(api.host, api.kubernetes_ips):
        return "is the ClusterIP of the Service kubernetes"
    # The Service kubernetes has the first address of the Service network, which the kubelet passes to each Pod.
    if api.in_cluster and not api.answered and api.host.endswith((".1", ":1")):
        return "does not answer and is probably the ClusterIP of the Service kubernetes"
    return ""


def _same_address(host: str, addresses: tuple[str, ...]) -> bool:
    try:
        return any(ip_address(host) == ip_address(address) for address in addresses)
    except ValueError:
        return False


def _clock(api: ApiFacts) -> Iterator[Finding]:
    if api.clock_offset is None:
        return
    seconds = abs(api.clock_offset)
    if seconds < CLOCK_WARNING_SECONDS:
        yield passed("ClockInSync", "the clock agrees with the API server's")
        return
    direction = "ahead of" if api.clock_offset > 0 else "behind"
    make = error if seconds >= CLOCK_ERROR_SECONDS else warning
    yield make(
        "ClockSkew",
        f"the clock is {seconds:.0f} s {direction} the API server's: tokens and certificates may be rejected",
        "synchronize the clock with chrony or systemd-timesyncd",
    )


def _node(facts: HostFacts) -> Iterator[Finding]:
    api, name = facts.api, facts.settings.node_name
    origin = "the host name"
    if facts.settings.name_is_overridden:
        origin = f"hostnameOverride; the host name is {facts.settings.host_name}"
    if api.node_missing:
        if api.similar:
            action = f"set --hostname-override={api.similar[0]}: that Node has an address of this machine"
        else:
            action = "set --hostname-override (hostnameOverride) to the name of this machine's Node"
        yield error("NodeNotFound", f'Node "{name}" ({origin}) does not exist: no endpoint counts as local', action)
        return
    if api.node is None:
        return
    own = frozenset().union(*facts.addresses.values())
    if not api.node.addresses:
        yield warning(
            "NodeWithoutAddress",
            f'Node "{name}" has no InternalIP: NodePorts do not answer in nftables mode',
            "check the kubelet and the cloud controller manager, which set the addresses",
        )
    elif own and not any(_same_address(address, tuple(own)) for address in api.node.addresses):
        yield warning(
            "NodeAddressNotLocal",
            f'Node "{name}" ({origin}) has the address {", ".join(api.node.addresses)}, but no interface here has it',
            "check --hostname-override (hostnameOverride): it may name another Node",
        )
    else:
        yield passed("NodeFound", f'Node "{name}" ({origin}) exists and has an address of this machine')


def _local_traffic(facts: HostFacts) -> Iterator[Finding]:
    """Judge whether kproxy can recognize traffic from the pods of this node (`detectLocalMode`)."""
    settings, node = facts.settings, facts.api.node
    names = [link.name for link in facts.links]
    if settings.local_mode == "NodeCIDR" and node and not node.pod_cidrs:
        yield error(
            "NodeWithoutPodCIDR",
            f'Node "{node.name}" has no podCIDRs: with detectLocalMode NodeCIDR, kproxy waits for them',
            "set kube-controller-manager --allocate-node-cidrs, or use another detectLocalMode",
        )
    elif settings.local_mode == "BridgeInterface" and settings.pod_bridge not in names:
        yield _no_interface(f"interface {settings.pod_bridge}", "detectLocal.bridgeInterface")
    elif settings.local_mode == "InterfaceNamePrefix" and not any(map(_starts(settings.pod_prefix), names)):
        yield _no_interface(f"interface named {settings.pod_prefix}...", "detectLocal.interfaceNamePrefix")
    if settings.local_mode != "ClusterCIDR":
        return
    if not settings.cluster_cidrs:
        yield info(
            "ClusterCIDRUnset",
            "clusterCIDR is not set: connections from outside to ClusterIPs are not masqueraded",
            "set --cluster-cidr (clusterCIDR) to the network of all pods, such as 10.244.0.0/16",
        )
        return
    outside = [cidr for cidr in (node.pod_cidrs if node else ()) if not _is_within(cidr, settings.cluster_cidrs)]
    if outside:
        yield warning(
            "PodCIDROutsideClusterCIDR",
            f"the pods of this node ({', '.join(outside)}) are outside clusterCIDR "
            f"({', '.join(settings.cluster_cidrs)}): their connections to ClusterIPs are masqueraded",
            "set --cluster-cidr (clusterCIDR) to the network of all pods",
        )


def _no_interface(missing: str, field: str) -> Finding:
    return warning(
        "PodInterfaceMissing",
        f"there is no {missing}: kproxy does not recognize traffic from the pods of this node",
        f"correct {field}, or wait until the network plugin has started the first pod",
    )


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def _is_within(cidr: str, networks: tuple[str, ...]) -> bool:
    """Return whether a CIDR is part of a network of its family. A family without networks does not restrict it."""
    try:
        inner = ip_network(cidr, strict=False)
        same = [network for network in map(ip_network, networks) if network.version == inner.version]
        return not same or any(inner.subnet_of(network) for network in same)  # type: ignore[arg-type]  # one family
    except ValueError:
        return True


def _ports(facts: HostFacts) -> Iterator[Finding]:
    free = []
    for field, address in facts.settings.listen.items():
        host, _, port = address.rpartition(":")
        taken = [each for each in facts.processes.sockets if each.port == int(port) and _overlap(host, each.address)]
        name, pid = facts.processes.holders.get(int(port), ("", 0))
        if not taken:
            free.append(address)
        elif pid not in facts.processes.own and not (facts.processes.own and not pid):
            holder = f"{name} (pid {pid})" if pid else "another process"
            yield error(
                "PortTaken",
                f"{field} {address}: {holder} listens on this port",
                f"stop it, or set --{_flag(field)} to another port",
            )
    if free:
        yield passed("PortsFree", f"nothing listens on {' and '.join(free)}")


def _flag(field: str) -> str:
    return {"healthzBindAddress": "healthz-bind-address", "metricsBindAddress": "metrics-bind-address"}[field]


def _overlap(host: str, other: str) -> bool:
    first, second = ip_address(host.strip("[]")), ip_address(other)
    if first.is_unspecified or second.is_unspecified:
        return True
    return first == second
