"""Replace the names of Services, namespaces and nodes in text by hashes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

from msgspec.structs import replace

from kproxy.model.types import EndpointSlice, Node, Service

_WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")
_PATH = re.compile(r"[A-Za-z0-9.-]+(?:/[A-Za-z0-9.-]+)+")
"""Words with slashes between them: `namespace/name`, also as part of something longer."""
_LABEL = re.compile(r'\b(namespace|service)="([^"]*)"')
"""A label of a metric."""
_OBJECT = re.compile(r"\b(Service|EndpointSlice|Services) ([a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*[a-z0-9])")
"""An object in a log line, which may have been deleted since."""
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
        for name in names:
            host, dot, _ = name.lower().partition(".")
            if name:
                self._nodes[name.lower()] = self.name(name.lower())
            if dot and not host.isalpha():  # a host with a name like `drop` would change rules
                self._nodes[host] = self.name(name.lower())

    def name(self, name: str) -> str:
        """Return the replacement of one name: a valid name of a Kubernetes object."""
        if not name or name in PUBLIC:
            return name
        return f"x{blake2b(name.encode(), key=self._salt, digest_size=5).hexdigest()}"

    def text(self, text: str) -> str:
        """Return a text with all names that were added replaced."""
        text = _LABEL.sub(lambda match: f'{match[1]}="{self.name(match[2])}"', text)
        text = _OBJECT.sub(lambda match: f"{match[1]} {self._pair(match[2])}", text)
        text = _PATH.sub(self._replace_path, text) if self._pairs else text
        return _WORD.sub(self._replace_node, text) if self._nodes else text

    def _pair(self, key: str) -> str:
        namespace, _, name = key.partition("/")
        return f"{self.name(namespace)}/{self.name(name)}"

    def _replace_path(self, match: re.Match[str]) -> str:
        """Replace each known `namespace/name` in words with slashes between them."""
        words = match[0].split("/")
        for index in range(len(words) - 1):
            # An nftables chain of kube-proxy is named `service-HASH-namespace/name/tcp/port`.
            ends = {words[index], *(words[index].rpartition(mark)[2] for mark in "-.")}
            bare = words[index + 1].rstrip(".-")
            for namespace in sorted(ends, key=len, reverse=True):
                if namespace and (found := self._pairs.get(f"{namespace}/{bare}")):
                    new_namespace, _, new_name = found.partition("/")
                    words[index] = words[index][: -len(namespace)] + new_namespace
                    words[index + 1] = new_name + words[index + 1][len(bare) :]
                    break
        return "/".join(words)

    def _replace_node(self, match: re.Match[str]) -> str:
        """Replace the name of a node, also in other case and with or without its domain."""
        word = match[0]
        if (found := self._nodes.get(word.lower())) is not None:
            return found
        host, dot, domain = word.lower().partition(".")
        if dot and (found := self._nodes.get(host)) is not None:
            return f"{found}.{self.name(domain)}"
        return word


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
