"""Replace the names of Services, namespaces and nodes in text by hashes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

from msgspec.structs import replace

from kproxy.model.types import EndpointSlice, Node, Service

_NAME = r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?"
_PAIR = re.compile(f"{_NAME}/{_NAME}")
_WORD = re.compile(_NAME)
PUBLIC = frozenset({"default", "kubernetes", "kube-system", "kube-dns", "kube-public", "kube-node-lease"})
"""Names that every cluster has. They stay readable."""


class Anonymizer:
    """Replaces names by hashes. The same name always gets the same hash, which depends on a secret `salt`.

    In free text, such as rules and log lines, only `namespace/name` and the names of nodes are replaced: a Service may
    have a name, such as `drop`, that means something else on its own.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._pairs: dict[str, str] = {}
        self._nodes: dict[str, str] = {}

    def add_objects(self, keys: Iterable[str]) -> None:
        """Add objects, as `namespace/name`."""
        for key in keys:
            namespace, _, name = key.partition("/")
            self._pairs[key] = f"{self.name(namespace)}/{self.name(name)}"

    def add_nodes(self, names: Iterable[str]) -> None:
        """Add the names of nodes."""
        self._nodes.update((name, self.name(name)) for name in names if name)

    def name(self, name: str) -> str:
        """Return the replacement of one name: a valid name of a Kubernetes object."""
        if not name or name in PUBLIC:
            return name
        return f"x{blake2b(name.encode(), key=self._salt, digest_size=5).hexdigest()}"

    def text(self, text: str) -> str:
        """Return a text with all names that were added replaced."""
        text = _PAIR.sub(self._replace_pair, text) if self._pairs else text
        return _WORD.sub(lambda match: self._nodes.get(match[0], match[0]), text) if self._nodes else text

    def _replace_pair(self, match: re.Match[str]) -> str:
        found = match[0]
        if found in self._pairs:
            return self._pairs[found]
        # An nftables chain of kube-proxy is named `service-HASH-namespace/name/tcp/port`.
        namespace, _, name = found.partition("/")
        for separator in ("-", "."):
            key = f"{namespace.rpartition(separator)[2]}/{name}"
            if key in self._pairs:
                return found[: -len(key)] + self._pairs[key]
        return found


def anonymous_service(service: Service, anonymizer: Anonymizer) -> Service:
    """Return a Service with other names."""
    return replace(service, namespace=anonymizer.name(service.namespace), name=anonymizer.name(service.name))


def anonymous_slice(endpoint_slice: EndpointSlice, anonymizer: Anonymizer) -> EndpointSlice:
    """Return an EndpointSlice with other names, which belongs to the Service with the other name."""
    namespace, _, name = endpoint_slice.service.partition("/")
    return replace(
        endpoint_slice,
        namespace=anonymizer.name(endpoint_slice.namespace),
        name=anonymizer.name(endpoint_slice.name),
        service=f"{anonymizer.name(namespace)}/{anonymizer.name(name)}",
        endpoints=tuple(
            replace(
                each,
                node=anonymizer.name(each.node),
                for_nodes=tuple(anonymizer.name(node) for node in each.for_nodes),
            )
            for each in endpoint_slice.endpoints
        ),
    )


def anonymous_node(node: Node, anonymizer: Anonymizer) -> Node:
    """Return a Node with another name."""
    return replace(node, name=anonymizer.name(node.name), uid="")
