"""Names of what nftables mode keeps in the kernel: the table, its sets and maps, and its chains.

Where kube-proxy has the same thing, it has the same name here, since people and tools look for it.
"""

from __future__ import annotations

import base64
import hashlib

from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import Family

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
LONGEST = 127
"""How long a name may be: the kernel takes more (NFT_NAME_MAXLEN, 256 with the final NUL), people hardly."""
LONGEST_COMMENT = 128
"""How long a comment may be (nft takes no more); that of a service port may be longer (63 + 63 + 15 characters)."""
_CUT = "..."
_LONGEST_PREFIX = len("endpoint-")


def table_family(family: Family) -> str:
    """Return the word that nft has for a family: `ip` or `ip6`."""
    return "ip6" if family is Family.IPV6 else "ip"


def service_port_name(plan: ServicePortPlan) -> str:
    """Return what the chains of a service port are called after their prefix, such as `AXK6CI2C-demo/web/tcp/http`."""
    return _hashed(_service_port_text(plan))


def endpoint_name(plan: ServicePortPlan, address: str, port: int) -> str:
    """Return what the chain and the set of one endpoint of a service port are called after their prefix.

    A name cannot hold colons: those of an IPv6 address become dots.
    """
    return _hashed(f"{_service_port_text(plan)}__{address.replace(':', '.')}/{port}")


def comment(text: str) -> str:
    """Return a text as a comment that nft takes."""
    return text if len(text) <= LONGEST_COMMENT else text[: LONGEST_COMMENT - len(_CUT)] + _CUT


def _service_port_text(plan: ServicePortPlan) -> str:
    return f"{plan.service}/{plan.protocol.lower()}/{plan.port_name}"


def _hashed(text: str) -> str:
    digest = base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:8]
    name = f"{digest}-{text}"
    longest = LONGEST - _LONGEST_PREFIX
    return name if len(name) <= longest else name[: longest - len(_CUT)] + _CUT
