"""Gather the facts about this node that `kproxy doctor` judges. Changes nothing on the node."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from kproxy.config import Config, node_name
from kproxy.config.conntrack_sysctls import PARAMETERS, sysctl_changes
from kproxy.config.types import Mode
from kproxy.diagnose.api_facts import ApiInquiry
from kproxy.diagnose.facts import (
    ApiFacts,
    HostFacts,
    IptablesProgram,
    IptablesVariant,
    ProcessFacts,
    ProxyChains,
    RuleFacts,
    Settings,
)
from kproxy.diagnose.legacy_save import LegacyRules, parse_legacy_save
from kproxy.diagnose.paths import SYSCTLS, reverse_path
from kproxy.diagnose.processes import is_kproxy, may_proxy
from kproxy.host.chain_survey import ChainSurvey, has_set, survey_chains
from kproxy.host.commands import CommandError, CommandRunner, first_line, run
from kproxy.host.interfaces import addresses_by_interface
from kproxy.host.links import default_route_interfaces, links
from kproxy.host.nf_tables import nat_unsupported_reason
from kproxy.host.observed import BaseChain, Link
from kproxy.host.process import has_net_admin
from kproxy.host.processes import (
    in_initial_pid_namespace,
    listening_sockets,
    open_file_limit,
    processes,
    socket_owners,
)
from kproxy.host.sysctl import ROOT, read_parameters
from kproxy.iptables.names import PORT_CHAIN_PREFIXES
from kproxy.iptables.runner import parse_version
from kproxy.iptables.variant import FOLDER_VARIABLE, KUBELET_CHAINS, LEGACY_TABLE_FILES
from kproxy.ipvs.cleanup import find_leftovers
from kproxy.model.types import Family
from kproxy.nftables.names import SERVICE_ENDPOINTS, TABLE
from kproxy.nftables.probe import unsupported_reason

PROGRAM_SECONDS = 1.0
"""Time limit for each program that is run."""
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h
_IPV6 = Path("/proc/thread-self/net/if_inet6")
_CONNTRACK_STATISTICS = Path("/proc/thread-self/net/stat/nf_conntrack")
_IPTABLES_TABLES = {"filter", "nat", "mangle", "raw", "security"}
_BUILT_IN = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
_CILIUM_SETTING = "root/tmp/cilium/config-map/kube-proxy-replacement"
"""Where the agent of Cilium finds this setting, below /proc/PID."""


def gather(
    config: Config,
    server: str | None = None,
    *,
    localhost_node_ports: Callable[[Config], bool] = lambda _: False,
    ask_api: bool = True,
) -> HostFacts:
    """Return the facts about this machine and this network namespace.

    `config` is kproxy's configuration. `server` is the value of `--master`. `localhost_node_ports` returns whether a
    configuration needs NodePorts on 127.0.0.1. Facts that need
    privileges are omitted if this process does not have them, and those about the API server unless `ask_api` is true.
    """
    net_admin = has_net_admin()
    ipv6_kernel = _IPV6.exists()
    families = list(Family) if ipv6_kernel else [Family.IPV4]
    iptables = _iptables()
    mode = config.effective_mode
    current = read_parameters(PARAMETERS)
    found_links = _or_empty(links)
    addresses = _addresses()
    defaults = default_route_interfaces()
    parameters = current | read_parameters([*SYSCTLS, *_reverse_paths(found_links)])
    host_name = socket.gethostname()
    name = node_name(config, host_name)
    conntrack = sysctl_changes(config.conntrack, os.cpu_count() or 1, current) if current else {}
    node_cidrs = ",".join([*config.cluster_cidrs, *config.node_port_addresses])
    settings = Settings(
        mode=mode,
        mode_is_set=bool(config.mode),
        node_name=name,
        host_name=host_name,
        name_is_overridden=bool(config.hostname_override.strip()),
        listen={
            field: address
            for field, address in (
                ("healthzBindAddress", config.healthz_bind_address),
                ("metricsBindAddress", config.metrics_bind_address),
            )
            if address
        },
        localhost_node_ports=localhost_node_ports(config),
        conntrack=conntrack,
        ipv6=":" in node_cidrs,
        local_mode=config.detect_local_mode,
        cluster_cidrs=config.cluster_cidrs,
        pod_bridge=config.detect_local.bridge_interface,
        pod_prefix=config.detect_local.interface_name_prefix,
    )
    inquiry = ApiInquiry(
        config.client_connection.kubeconfig or None, server, name, frozenset().union(*addresses.values())
    )
    if ask_api:
        inquiry.start()
    process_facts = _processes(settings)
    own = process_facts.own[0] if process_facts.own else None
    return HostFacts(
        settings=settings,
        kernel=os.uname().release,
        uid=os.geteuid(),
        net_admin=net_admin,
        net_raw=_has_capability(CAP_NET_RAW),
        ipv6_kernel=ipv6_kernel,
        support=_support(mode, families, iptables) if net_admin else {},
        iptables=iptables,
        nft_version=_nft_version(),
        parameters=parameters,
        writable=frozenset(path for path in {*parameters, *conntrack} if os.access(ROOT / path, os.W_OK)),
        conntrack_drops=_conntrack_drops(),
        links=found_links,
        addresses=addresses,
        default_interfaces=defaults,
        rules=_rules(iptables),
        processes=process_facts,
        open_files=open_file_limit(own) if own else _own_file_limit(),
        api=inquiry.result() if ask_api else ApiFacts(),
    )


# Modes and programs.


def _support(mode: Mode, families: Iterable[Family], iptables: IptablesProgram) -> dict[Family, str]:
    if mode == "nftables":
        return {family: _reason(partial(unsupported_reason, family)) for family in families}
    if iptables.variant == "nft":
        return {family: _reason(partial(nat_unsupported_reason, family)) for family in families}
    # Without a table nat, only creating it would show whether the kernel supports it.
    programs = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
    return {family: "" for family in families if "nat" in _legacy_tables(programs[family])}


def _reason(check: Callable[[], str]) -> str:
    try:
        return check()
    except OSError as error:
        return error.strerror or str(error)


def _iptables() -> IptablesProgram:
    try:
        done = run(["iptables", "--version"], timeout=PROGRAM_SECONDS)
        if done.code:
            return IptablesProgram(problem=done.error_message)
        version = parse_version(done.stdout)
    except CommandError as error:
        return IptablesProgram(problem=str(error))
    return IptablesProgram(number=version.number, variant="nft" if version.nft else "legacy")


def _nft_version() -> str:
    try:
        done = run(["nft", "--version"], timeout=PROGRAM_SECONDS)
    except CommandError:
        return ""
    return first_line(done.stdout) if done.code == 0 else ""


# Rules.


def _rules(iptables: IptablesProgram) -> RuleFacts:
    unreadable = []
    try:
        survey = survey_chains()
    except OSError as error:
        survey = ChainSurvey((), ())
        if error.errno not in {errno.EPROTONOSUPPORT, errno.EINVAL}:  # a kernel without nf_tables has no rules in it
            unreadable.append(f"nf_tables: {error.strerror or error}")
    legacy: list[LegacyRules] = []
    for program, family in (("iptables", "ip"), ("ip6tables", "ip6")):
        try:
            legacy.append(_legacy_rules(program, family, iptables))
        except (OSError, CommandError) as error:
            unreadable.append(f"{program}-legacy: {getattr(error, 'strerror', None) or error}")
    nft_chains = [(table, name) for _, table, name in survey.names if table in _IPTABLES_TABLES]
    legacy_chains = [chain for each in legacy for chain in each.chains]
    chains: dict[IptablesVariant, list[tuple[str, str]]] = {"nft": nft_chains, "legacy": legacy_chains}
    used: dict[IptablesVariant, bool] = {
        "nft": any(name not in _BUILT_IN for _, name in nft_chains),
        "legacy": any(each.rules for each in legacy) or bool(legacy_chains),
    }
    tables = [name for _, table, name in survey.names if table == TABLE]
    proxies = [_proxy_chains(variant, found) for variant, found in chains.items()]
    if tables:
        proxies.append(ProxyChains("table", len(tables), _is_own_table()))
    interface, ipsets = _ipvs()
    base: list[BaseChain] = [*survey.base, *(chain for each in legacy for chain in each.base)]
    return RuleFacts(
        base_chains=tuple(chain for chain in base if chain.table != TABLE),
        proxies=tuple(each for each in proxies if each.number),
        variants=frozenset(variant for variant, is_used in used.items() if is_used),
        kubelet=frozenset(
            variant for variant, found in chains.items() if any(name in KUBELET_CHAINS for _, name in found)
        ),
        unreadable="; ".join(dict.fromkeys(unreadable)),
        ipvs_interface=interface,
        ipsets=ipsets,
    )


def _proxy_chains(variant: IptablesVariant, chains: Iterable[tuple[str, str]]) -> ProxyChains:
    """Count the chains of Services. KUBE- chains that the kubelet creates do not count."""
    prefixes = ("KUBE-SERVICES", *PORT_CHAIN_PREFIXES)
    return ProxyChains(variant, sum(name.startswith(prefixes) for _, name in chains))


def _is_own_table() -> bool:
    with suppress(OSError):
        return any(has_set(family, TABLE, SERVICE_ENDPOINTS) for family in ("ip", "ip6"))
    return False


def _legacy_rules(program: str, family: str, iptables: IptablesProgram) -> LegacyRules:
    """Return the rules of iptables-legacy, without creating tables. Raises `OSError` or `CommandError`."""
    tables = _existing_legacy_tables(program)
    if not tables:
        return LegacyRules()
    name = f"{program}-legacy-save"
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        name = str(Path(folder, "legacy", f"{program}-save"))
    elif iptables.variant == "legacy" and not shutil.which(name):
        name = f"{program}-save"
    lines: list[str] = []
    for table in tables:
        with CommandRunner().stream_output([name, "-t", table], timeout=PROGRAM_SECONDS) as output:
            # Rules of the chains of Services are of no interest, and there may be many.
            lines += [line for line in output if not line.startswith("-A KUBE-")]
    return parse_legacy_save(lines, family)


def _existing_legacy_tables(program: str) -> list[str]:
    """Return the existing tables. Raises `OSError` if they cannot be read, for example without root."""
    try:
        return LEGACY_TABLE_FILES[program].read_text().split()
    except FileNotFoundError:
        return []  # the kernel module is not loaded


def _legacy_tables(program: str) -> list[str]:
    with suppress(OSError):
        return _existing_legacy_tables(program)
    return []


def _ipvs() -> tuple[bool, int]:
    with suppress(OSError):
        found = find_leftovers()
        return bool(found.interface), len(found.sets)
    return False, 0


# The machine.


def _has_capability(number: int) -> bool:
    with suppress(OSError, ValueError, IndexError):
        status = Path("/proc/thread-self/status").read_text()
        return bool(int(status.split("CapEff:")[1].split()[0], 16) >> number & 1)
    return True


def _or_empty(read: Callable[[], tuple[Link, ...]]) -> tuple[Link, ...]:
    with suppress(OSError):
        return read()
    return ()


def _addresses() -> dict[int, frozenset[str]]:
    with suppress(OSError):
        return addresses_by_interface(socket.AF_UNSPEC)
    return {}


def _reverse_paths(found: Iterable[Link]) -> list[str]:
    return [reverse_path("all"), *(reverse_path(link.name) for link in found if not link.loopback)]


def _conntrack_drops() -> int:
    """Return how many packets were dropped because the table was full or had no memory, on all CPUs."""
    with suppress(OSError, ValueError):
        header, *lines = _CONNTRACK_STATISTICS.read_text().splitlines()
        column = header.split().index("drop")
        return sum(int(line.split()[column], 16) for line in lines)
    return 0


def _own_file_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _processes(settings: Settings) -> ProcessFacts:
    found = [each for each in processes() if each.same_network is not False]
    own = tuple(each.pid for each in found if is_kproxy(each))
    proxies = tuple(each for each in found if may_proxy(each))
    ports = {int(address.rpartition(":")[2]) for address in settings.listen.values()}
    sockets = tuple(each for each in listening_sockets() if each.port in ports)
    owners = socket_owners({each.inode for each in sockets}) if sockets else {}
    names = {each.pid: each.name for each in found}
    return ProcessFacts(
        own=own,
        proxies=proxies,
        cilium_replaces=_cilium_replaces(each.pid for each in proxies if each.name == "cilium-agent"),
        sockets=sockets,
        holders={
            each.port: (names.get(owners[each.inode], "a process"), owners[each.inode])
            for each in sockets
            if each.inode in owners
        },
        all_visible=in_initial_pid_namespace(),
    )


def _cilium_replaces(pids: Iterable[int]) -> bool | None:
    """Return whether Cilium's agent replaces kube-proxy, or None if its setting cannot be read."""
    for pid in pids:
        with suppress(OSError):
            return Path(f"/proc/{pid}/{_CILIUM_SETTING}").read_text().strip() in {"true", "strict"}
    return None
