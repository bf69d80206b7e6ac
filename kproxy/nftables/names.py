"""The names of the nftables table and of its sets, maps and chains. Pure.

Objects that also exist in kube-proxy's table keep kube-proxy's names, because operators and tools search for them.
"""

from __future__ import annotations

import base64
import hashlib
import re

from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import Family, Protocol, ServiceKey

TABLE = "kube-proxy"
CLUSTER_IPS = "cluster-ips"
NODE_PORT_IPS = "nodeport-ips"
HAIRPINS = "hairpin-connections"
SERVICE_IPS = "service-ips"
SERVICE_NODE_PORTS = "service-nodeports"
NO_ENDPOINT_SERVICES = "no-endpoint-services"
NO_ENDPOINT_NODE_PORTS = "no-endpoint-nodeports"
FIREWALL_IPS = "firewall-ips"
SERVICE_ENDPOINTS = "service-endpoints"
SERVICE_LOCAL_ENDPOINTS = "service-local-endpoints"
NODE_PORT_ENDPOINTS = "nodeport-endpoints"
NODE_PORT_LOCAL_ENDPOINTS = "nodeport-local-endpoints"
REJECT = "reject-chain"
LOCALHOST_NODE_PORTS = "localhost-nodeports"
LOCALHOST_CHECK = "localhost-nodeports-check"
LOCALHOST_REJECT = "localhost-reject"
LOCALHOST_PROXY = "localhost-proxy"
MAX_NAME_LENGTH = 127
"""Maximum length of a name in characters. The kernel accepts 255 (NFT_NAME_MAXLEN), but long names are hard to read."""
_ELLIPSIS = "..."
_SERVICE_CHAIN = re.compile(r"(service|local|external|endpoint|firewall)-[A-Z2-7]{8}-(.*)")
_LONGEST_PREFIX = len("endpoint-")


def rejected_counter(protocol: Protocol) -> str:
    """Return the name of the counter of packets that were rejected because they were for a NodePort on loopback."""
    return f"localhost-nodeport-rejected-{protocol.lower()}"


def table_family(family: Family) -> str:
    """Return nft's name for a family: `ip` or `ip6`."""
    return "ip6" if family is Family.IPV6 else "ip"


def service_port_suffix(plan: ServicePortPlan) -> str:
    """Return the suffix that identifies a service port in chain names, such as `AXK6CI2C-demo/web/tcp/http`."""
    return _hashed(_service_port_text(plan))


def endpoint_suffix(plan: ServicePortPlan, address: str, port: int) -> str:
    """Return the suffix that identifies an endpoint of a service port in the names of its chain and set.

    Names must not contain colons, so the colons of an IPv6 address are replaced with dots.
    """
    return _hashed(f"{_service_port_text(plan)}__{address.replace(':', '.')}/{port}")


def kind_of_service_chain(name: str, service: ServiceKey) -> str:
    """Return the first part of the name of a chain, such as `endpoint`, or "" if it is not a chain of this Service."""
    found = _SERVICE_CHAIN.fullmatch(name)
    if found is None:
        return ""
    text, start = found[2], f"{service}/"
    if text.endswith(_ELLIPSIS):
        text = text.removesuffix(_ELLIPSIS)
        start = start[: len(text)]
    return found[1] if text.startswith(start) else ""


def _service_port_text(plan: ServicePortPlan) -> str:
    return f"{plan.service}/{plan.protocol.lower()}/{plan.port_name}"


def _hashed(text: str) -> str:
    digest = base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:8]
    name = f"{digest}-{text}"
    longest = MAX_NAME_LENGTH - _LONGEST_PREFIX
    return name if len(name) <= longest else name[: longest - len(_ELLIPSIS)] + _ELLIPSIS
