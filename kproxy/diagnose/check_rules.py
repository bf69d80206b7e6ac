"""Judge the rules of all programs: variants of iptables, other service proxies and their leftovers, firewalls. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kproxy.diagnose.facts import HostFacts, ProxyChains
from kproxy.diagnose.finding import Finding, error, info, passed, warning
from kproxy.diagnose.processes import CERTAIN, PROXIES, known_name
from kproxy.host.observed import BaseChain, ObservedProcess

CILIUM_INTERFACE, CALICO_BPF_INTERFACE, KUBE_ROUTER_INTERFACE = "cilium_host", "bpfin.cali", "kube-dummy-if"
NETWORK_PLUGINS = {
    "cali-": "Calico",
    "CILIUM_": "Cilium",
    "FLANNEL-FWD": "flannel",
    "KUBE-ROUTER-": "kube-router",
    "WEAVE-": "Weave Net",
    "ANTREA-": "Antrea",
    "CNI-FORWARD": "a CNI plugin",
    "OVN-KUBE-": "OVN-Kubernetes",
}
"""Network plugins, by the prefixes of the chains to which their rules in built-in chains jump.

These chains accept the traffic of pods, so that a policy `drop` does not affect it.
"""
FIREWALLS = {
    "ufw": "ufw",
    "DOCKER": "Docker",
    "NETAVARK": "Podman",
    "LIBVIRT_": "libvirt",
    "f2b-": "fail2ban",
}
"""Other programs, by the prefixes of their chains in iptables."""
FIREWALL_ADVICE = {
    "firewalld": "put the pod network into the zone trusted: firewall-cmd --permanent --zone=trusted "
    "--add-source=POD_CIDR, then firewall-cmd --reload",
    "ufw": "allow forwarding: ufw route allow from POD_CIDR, and ufw route allow to POD_CIDR",
    "Docker": "let Docker accept it: iptables -I DOCKER-USER -d POD_CIDR -j ACCEPT, and the same with -s",
}
_STOP = {
    "kube-proxy": "remove its DaemonSet or unit from this node (docs/operations.md, Replace kube-proxy)",
    "kubelite": "start MicroK8s without kube-proxy",
}


def check_rules(facts: HostFacts) -> Iterator[Finding]:
    """Yield the findings about rules, and about processes that program rules."""
    yield from _other_proxies(facts)
    yield from _leftovers(facts)
    yield from _variants(facts)
    yield from _firewalls(facts)


# Other proxies.


def _other_proxies(facts: HostFacts) -> Iterator[Finding]:
    found = list(_running(facts))
    yield from found
    if len(facts.processes.own) > 1:
        pids = ", ".join(map(str, facts.processes.own))
        yield error(
            "SeveralKproxies",
            f"{len(facts.processes.own)} kproxy daemons run on this node (pids {pids})",
            "stop all but one of them",
        )
    elif facts.processes.own:
        yield passed("KproxyRunning", f"kproxy is running (pid {facts.processes.own[0]})")
    if not facts.processes.all_visible:
        yield info(
            "ProcessesHidden",
            "only the processes in this PID namespace are visible: other proxies on the node may be missing here",
            "run the command on the node itself, or in a Pod with hostPID: true",
        )
    elif not any(each.severity == "error" for each in found):
        yield passed("NoOtherProxy", "no other service proxy is running in this network namespace")


def _running(facts: HostFacts) -> Iterator[Finding]:
    names = {link.name for link in facts.links}
    seen: dict[str, list[ObservedProcess]] = {}
    for process in facts.processes.proxies:
        seen.setdefault(known_name(process), []).append(process)
    for name, processes in seen.items():
        subject = f"{PROXIES[name]} (pid {processes[0].pid})"
        if name in CERTAIN or (name == "kube-router" and _runs_service_proxy(processes)):
            yield _conflict(subject, _STOP.get(name, "start it with --run-service-proxy=false"))
        elif name.startswith("k3s"):
            yield warning(
                "OtherProxyPossible",
                f"this node runs {subject}",
                "make sure that it runs with --disable-kube-proxy",
            )
        elif name == "cilium-agent":
            yield from _cilium(facts, subject, processes)
        elif name == "calico-node" and CALICO_BPF_INTERFACE in names:
            yield _conflict(
                f"Calico's eBPF data plane (pid {processes[0].pid})",
                "set bpfEnabled: false in the FelixConfiguration, or do not run kproxy",
            )
    if KUBE_ROUTER_INTERFACE in names and "kube-router" not in seen:
        yield warning(
            "KubeRouterLeftovers",
            f"the interface {KUBE_ROUTER_INTERFACE} of kube-router's service proxy still exists",
            "run kube-router --cleanup-config, or restart the node",
        )
    if CALICO_BPF_INTERFACE in names and "calico-node" not in seen and facts.processes.all_visible:
        yield warning(
            "CalicoBPFLeftovers",
            f"the interface {CALICO_BPF_INTERFACE} of Calico's eBPF data plane still exists",
            "restart the node: the eBPF programs of Calico still process packets to Services",
        )


def _cilium(facts: HostFacts, subject: str, processes: Iterable[ObservedProcess]) -> Iterator[Finding]:
    flags = {word for process in processes for word in process.argv}
    replaces = facts.processes.cilium_replaces
    if replaces or "--kube-proxy-replacement=true" in flags or "--kube-proxy-replacement=strict" in flags:
        yield _conflict(
            f"{subject} with kubeProxyReplacement: true", "set kubeProxyReplacement: false, or do not run kproxy"
        )
    elif replaces is None:
        yield warning(
            "OtherProxyPossible",
            f"this node runs {subject}, whose setting kubeProxyReplacement could not be read",
            "make sure that kubeProxyReplacement is false: cilium config view | grep kube-proxy-replacement",
        )


def _runs_service_proxy(processes: Iterable[ObservedProcess]) -> bool:
    return any("--run-service-proxy=false" not in process.argv for process in processes)


def _conflict(subject: str, action: str) -> Finding:
    return error("OtherProxyRunning", f"{subject} is running: two service proxies overwrite each other's rules", action)


# Leftovers.


def _chains(facts: HostFacts, place: str) -> ProxyChains | None:
    return next((each for each in facts.rules.proxies if each.place == place), None)


def _leftovers(facts: HostFacts) -> Iterator[Finding]:
    mode = facts.settings.mode
    proxy_runs = any(known_name(process) in CERTAIN for process in facts.processes.proxies)
    own, table = facts.processes.own, _chains(facts, "table")
    variant = facts.iptables.variant if facts.iptables and not facts.iptables.problem else "nft"
    rules = _chains(facts, variant)
    foreign = ([f"{_count(rules.number)} of iptables mode"] if mode == "nftables" and rules else []) + (
        ["the nftables table kube-proxy"] if mode == "iptables" and table else []
    )
    if foreign and not proxy_runs:
        if own:
            yield warning(
                "OtherModeLeftovers",
                f"leftovers of another mode, although kproxy (pid {own[0]}) is running and {mode} mode is configured: "
                f"{' and '.join(foreign)}",
                "repeat the command with that kproxy's flags; if they say the same, its log has the reason",
            )
        else:
            yield info(
                "OtherModeLeftovers",
                f"leftovers of another mode: {' and '.join(foreign)}; kproxy removes them after its first sync",
            )
    if mode == "nftables" and table and not table.own and not proxy_runs and not own:
        yield info(
            "KubeProxyLeftovers",
            f"the table kube-proxy was written by kube-proxy ({_count(table.number)}); kproxy takes it over",
        )
    elif mode == "iptables" and rules and not proxy_runs and not own:
        yield info(
            "KubeProxyLeftovers",
            f"iptables has {_count(rules.number)} of kube-proxy or kproxy; kproxy takes them over",
        )
    if facts.rules.ipvs_interface or facts.rules.ipsets:
        parts = ["the interface kube-ipvs0"] * facts.rules.ipvs_interface
        parts += [f"{facts.rules.ipsets} ipsets"] * bool(facts.rules.ipsets)
        yield (warning if own else info)(
            "IPVSLeftovers",
            f"{' and '.join(parts)} of kube-proxy's ipvs mode exist; kproxy removes them after its first sync",
            "run kproxy run --cleanup to remove them now, if no proxy is in use",
        )


# Variants of iptables.


def _variants(facts: HostFacts) -> Iterator[Finding]:
    nft, legacy = _chains(facts, "nft"), _chains(facts, "legacy")
    installed = facts.iptables if facts.iptables and not facts.iptables.problem else None
    if nft and legacy:
        yield error(
            "ServiceRulesInBothVariants",
            f"Services have rules in iptables-nft ({_count(nft.number)}) and iptables-legacy ({legacy.number}): "
            "packets traverse both, and one of them is stale",
            "remove the stale rules, as docs/troubleshooting.md describes, or restart the node",
        )
        return
    other = legacy if installed is None or installed.variant == "nft" else nft
    if other:
        user = f"kproxy uses {installed}" if installed and facts.settings.mode == "iptables" else "nothing updates them"
        yield error(
            "ServiceRulesInOtherVariant",
            f"iptables-{other.place} has rules for Services ({_count(other.number)}), but {user}: they become stale",
            "remove them, as docs/troubleshooting.md describes, or restart the node",
        )
        return
    used = facts.iptables.variant if installed and facts.iptables else None
    if facts.settings.mode == "iptables" and used and facts.rules.kubelet and used not in facts.rules.kubelet:
        yield warning(
            "KubeletUsesOtherVariant",
            f"the kubelet uses iptables-{next(iter(facts.rules.kubelet))}, but kproxy uses {installed}",
            "make kproxy use the kubelet's variant: update-alternatives --config iptables, or kproxy's image",
        )
    elif len(facts.rules.variants) > 1:
        yield warning(
            "RulesInBothVariants",
            "both iptables-legacy and iptables-nft have rules: a packet must pass both",
            "use one variant for all programs on this node; compare iptables-legacy-save and iptables-nft-save",
        )
    elif facts.net_admin and not facts.rules.unreadable:
        which = f"only iptables-{next(iter(facts.rules.variants))}" if facts.rules.variants else "no iptables variant"
        yield passed("OneVariant", f"{which} has rules")
    if facts.net_admin and facts.rules.unreadable:
        yield info(
            "RulesUnreadable",
            f"some rules could not be read: {facts.rules.unreadable}",
            "compare iptables-legacy-save and iptables-nft-save on the node",
        )


# Firewalls.


def owner_of(chain: BaseChain) -> str:
    """Return the program to which a base chain belongs, as far as its table and the chains it jumps to show."""
    if chain.table == "firewalld":
        return "firewalld"
    for prefix, name in (FIREWALLS | NETWORK_PLUGINS).items():
        if chain.table.lower() == name.lower() or any(jump.startswith(prefix) for jump in chain.jumps):
            return name
    return ""


def plugin_of(chain: BaseChain) -> str:
    """Return the network plugin whose chain a base chain uses, or ""."""
    if chain.table == "calico":
        return "Calico"
    names = (name for prefix, name in NETWORK_PLUGINS.items() if any(jump.startswith(prefix) for jump in chain.jumps))
    return next(names, "")


def describe(chain: BaseChain) -> str:
    """Return how a base chain is named for people."""
    owner = owner_of(chain)
    place = f"iptables-legacy {chain.table}" if chain.legacy else f"table {chain.family} {chain.table}"
    return f"chain {chain.name} of {place}{f' ({owner})' if owner else ''}"


def _firewalls(facts: HostFacts) -> Iterator[Finding]:
    dropping = [chain for chain in facts.rules.base_chains if chain.drops_rest and chain.hook != "postrouting"]
    grouped: dict[tuple[str, str, str, str, bool], list[BaseChain]] = {}
    for chain in dropping:
        families = grouped.setdefault((chain.table, chain.name, chain.hook, owner_of(chain), chain.accepts), [])
        families.append(chain)
    findings = [_firewall(chains) for chains in grouped.values()]
    yield from findings
    if facts.net_admin and not findings:
        yield passed("NoFirewallDrops", "no other program's base chain drops packets by default")


def _firewall(chains: list[BaseChain]) -> Finding:
    """Judge one chain, which may exist in the tables of both families."""
    chain = chains[0]
    does = "rejects" if chain.final == "reject" else "drops"
    how = f"{does} what its rules do not accept" if chain.accepts else f"{does} all packets"
    seen = f"{describe(chain)} {how} at hook {chain.hook}"
    plugin, owner = plugin_of(chain), owner_of(chain)
    if not chain.accepts:
        return error("FirewallDropsEverything", seen, "accept the traffic of pods and Services, or remove the chain")
    if plugin:
        return info("FirewallWithPlugin", f"{seen}; the chains of {plugin} accept the traffic of pods")
    if chain.hook in {"input", "prerouting"}:
        return info(
            "FirewallAtInput",
            seen,
            "make sure that it accepts 10256/tcp, health check node ports, and the ports of Pods with hostNetwork",
        )
    advice = FIREWALL_ADVICE.get(owner, "accept packets from and to the pod network, such as 10.244.0.0/16")
    return warning("FirewallAtForward" if chain.hook == "forward" else "FirewallAtOutput", seen, advice)


def _count(chains: int) -> str:
    return f"{chains} chain{'s' * (chains != 1)}"
