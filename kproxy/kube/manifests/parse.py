"""Decode the Services, EndpointSlices, Nodes and ServiceCIDRs in the text of files. Pure.

A file contains the output of `kubectl get -o yaml` or `kubectl get -o json`, or a response body of the API server. It
can be one object, a `List`, or a typed list such as `ServiceList`. The items of a typed list need no `kind` or
`apiVersion`. A YAML file can have several documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from kproxy.documents.document import Document, DocumentError, FieldPath, FileProblem
from kproxy.documents.parse import read_documents
from kproxy.kube.codec.conversion import DecodedObject, ignored_fields_text
from kproxy.kube.codec.json_codec import decode_object, decoder
from kproxy.kube.codec.object_error import ObjectError, explain, must_be
from kproxy.kube.codec.watch_events import one_line
from kproxy.model.delta import Kind, Object, Replace
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR


class ManifestKind(Struct, frozen=True):
    """A kind that kproxy uses: its type, its supported apiVersions, and whether it is namespaced."""

    kind: Kind
    api_versions: tuple[str, ...]
    namespaced: bool = True


MANIFEST_KINDS = {
    "Service": ManifestKind(Service, ("v1",)),
    "EndpointSlice": ManifestKind(EndpointSlice, ("discovery.k8s.io/v1",)),
    "Node": ManifestKind(Node, ("v1",), namespaced=False),
    "ServiceCIDR": ManifestKind(ServiceCIDR, ("networking.k8s.io/v1", "networking.k8s.io/v1beta1"), namespaced=False),
}
"""The kinds that kproxy uses, keyed by the `kind` that objects have in files."""

Identity: TypeAlias = tuple[str, str, str]
"""The kind, namespace and name of an object. The namespace is "" for Nodes and ServiceCIDRs."""


class ManifestFile(Struct, frozen=True):
    """The content of one file.

    `objects` are in the order of the file. An object that gets no rules, such as a headless Service, is represented by
    None. `ignored_kinds` are the kinds in the file that kproxy does not use. `warnings` are log lines about addresses
    and ports that cannot be used. `invalid` are the objects that cannot be used, with the problem of each; the last
    valid state of these objects stays in use. If there are `problems`, the file must not be used.
    """

    path: str
    objects: tuple[tuple[Identity, Object | None], ...] = ()
    ignored_kinds: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()
    warnings: tuple[str, ...] = ()
    invalid: tuple[tuple[Identity, FileProblem], ...] = ()


class LoadedManifests(Struct, frozen=True):
    """The objects of several files, and lines for the log.

    `replacements` has one entry for each kind in `MANIFEST_KINDS`, in the order of `MANIFEST_KINDS`. A kind without
    objects has an empty entry. `notes` are lines about kinds that kproxy does not use. `warnings` are lines about
    objects that are defined more than once, and about endpoints and ports that cannot be used. `problems` are those of
    files that cannot be used, and of invalid objects.
    """

    replacements: tuple[Replace, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()


class _TypeMeta(Struct, rename="camel"):
    api_version: str = ""
    kind: str = ""


class _ManifestMetadata(Struct):
    name: str = ""
    namespace: str = ""


class _ManifestHeader(Struct):
    metadata: _ManifestMetadata


class _JsonList(Struct):
    items: list[msgspec.Raw] | None = None


class _DataList(Struct):
    items: list[Any] | None = None


class _ManifestItem(Struct):
    """One object of a document: its content, its path in the document, and its type.

    `api_version` and `kind` come from the object itself or from the typed list that contains it. They are "" while
    unknown.
    """

    content: bytes | Any
    path: FieldPath
    api_version: str = ""
    kind: str = ""


_decode_type_meta = decoder(_TypeMeta)
_decode_metadata = decoder(_ManifestHeader)
_decode_json_list = decoder(_JsonList)
_decode_data_list = decoder(_DataList)
_decode_any = msgspec.json.Decoder().decode


def load_objects(texts: Mapping[str, bytes]) -> LoadedManifests:
    """Return the objects in files. `texts` maps each file's path to its text.

    For a file with problems, only the problems are returned, not the objects.
    """
    return combine(parse_file(path, text) for path, text in texts.items())


def combine(files: Iterable[ManifestFile]) -> LoadedManifests:
    """Combine the objects of several files, in the order of the files' paths.

    For a file with problems, only the problems are returned, not the objects. If an object is defined more than once,
    the last valid definition is used. Objects without a valid definition are in `Replace.unreadable`.
    """
    objects: dict[Identity, tuple[str, Object | None]] = {}
    notes: list[str] = []
    warnings: list[str] = []
    problems: list[FileProblem] = []
    invalid: dict[Identity, None] = {}
    for file in sorted(files, key=lambda file: file.path):
        problems.extend(file.problems)
        if file.problems:
            continue
        notes.extend(f"{file.path}: ignoring {kind}: kproxy does not use this kind" for kind in file.ignored_kinds)
        warnings.extend(file.warnings)
        problems.extend(problem for _, problem in file.invalid)
        invalid.update(dict.fromkeys(identity for identity, _ in file.invalid))
        for identity, item in file.objects:
            earlier = objects.pop(identity, None)
            if earlier is not None:
                warnings.append(_duplicate_warning(identity, earlier[0], file.path))
            objects[identity] = (file.path, item)
    with_rules = [item for _, item in objects.values() if item is not None]
    without_rules = Counter(kind for (kind, _, _), (_, item) in objects.items() if item is None)
    replacements = [
        Replace(
            manifest.kind,
            tuple(item for item in with_rules if type(item) is manifest.kind),
            tuple(identity[1:] for identity in invalid if identity[0] == name and identity not in objects),
            ignored=without_rules[name],
        )
        for name, manifest in MANIFEST_KINDS.items()
    ]
    return LoadedManifests(tuple(replacements), tuple(notes), tuple(warnings), tuple(problems))


def parse_file(path: str, text: bytes) -> ManifestFile:
    """Decode the text of one file.

    `path` names the file in problems. If it ends in `.json`, the text must be JSON; otherwise, YAML is allowed too.
    """
    try:
        documents = read_documents(text, json=path.endswith(".json"))
    except DocumentError as error:
        return ManifestFile(path, problems=(FileProblem(path, str(error), error.line, error.column),))
    parser = _FileParser(path)
    for document in documents:
        parser.add_document(document)
    if not documents:
        parser.add_problem("contains no Kubernetes objects")
    return ManifestFile(
        path,
        tuple(parser.objects),
        tuple(dict.fromkeys(parser.ignored_kinds)),
        tuple(parser.problems),
        tuple(parser.warnings),
        tuple(parser.invalid),
    )


class _FileParser:
    """Collects the objects and problems of all documents in one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.objects: list[tuple[Identity, Object | None]] = []
        self.ignored_kinds: list[str] = []
        self.problems: list[FileProblem] = []
        self.warnings: list[str] = []
        self.invalid: list[tuple[Identity, FileProblem]] = []

    def add_problem(self, message: str, line: int = 0) -> None:
        self.problems.append(FileProblem(self.path, message, line))

    def add_document(self, document: Document) -> None:
        """Add the object of a document, or its items if it is a list. Invalid objects become problems."""
        try:
            items = list(_items(document.content))
        except ObjectError as error:
            self._add_error(_ManifestItem(document.content, ()), error, document)
            return
        for item in items:
            try:
                self._add_item(item, document)
            except ObjectError as error:
                self._add_error(item, error, document)

    def _add_item(self, item: _ManifestItem, document: Document) -> None:
        manifest = _complete_type(item)
        if manifest is None:
            self.ignored_kinds.append(f"{item.api_version} {item.kind}".strip())
            return
        decoded = _decode(manifest, item.content)
        if decoded.ignored_fields:
            line = document.line_of((*item.path, *decoded.ignored_fields[0].field))
            ignored = ignored_fields_text(decoded.ignored_fields)
            text = f"{_name_of(item)}: ignoring unusable addresses and ports: {ignored}"
            self.warnings.append(str(FileProblem(self.path, text, line)))
        namespace = decoded.namespace if manifest.namespaced else ""
        self.objects.append(((item.kind, namespace, decoded.name), decoded.object))

    def _add_error(self, item: _ManifestItem, error: ObjectError, document: Document) -> None:
        text = ": ".join(filter(None, (one_line(_name_of(item)), str(error))))
        line = document.line_of((*item.path, *error.field))
        identity = _identity_of(item)
        if identity is None:
            self.add_problem(text, line)
        else:
            self.invalid.append((identity, FileProblem(self.path, text, line)))


def _items(content: bytes | Any) -> Iterator[_ManifestItem]:
    """Yield the items of a document that is a list, or the object of any other document. Raises `ObjectError`.

    A typed list of a kind that kproxy does not use, such as `PodList`, is yielded as one object.
    """
    own = _type_of(content)
    if not own.kind:
        raise ObjectError("is missing", ("kind",))
    item_kind = own.kind.removesuffix("List")
    if item_kind == own.kind or (item_kind and item_kind not in MANIFEST_KINDS):
        yield _ManifestItem(content, (), own.api_version, own.kind)
        return
    items: list[Any] | None = (_decode_json_list if isinstance(content, bytes) else _decode_data_list)(content).items
    for index, item in enumerate(items or ()):
        yield _ManifestItem(item, ("items", index), own.api_version if item_kind else "", item_kind)


def _complete_type(item: _ManifestItem) -> ManifestKind | None:
    """Complete the type of an item. A type in the item's own content takes precedence over that of its list.

    Return None for a kind that kproxy does not use. Raises `ObjectError` for a missing or unsupported type.
    """
    own = _type_of(item.content)
    item.kind = own.kind or item.kind
    item.api_version = own.api_version or item.api_version
    if not item.kind:
        raise ObjectError("is missing", ("kind",))
    manifest = MANIFEST_KINDS.get(item.kind)
    group, _, _ = item.api_version.rpartition("/")
    if manifest is None or (group and group != manifest.api_versions[0].rpartition("/")[0]):
        return None
    if item.api_version not in manifest.api_versions:
        expected = " or ".join(manifest.api_versions)
        if not item.api_version:
            raise ObjectError(f"is missing (must be {expected})", ("apiVersion",))
        raise must_be(expected, item.api_version, "apiVersion")
    return manifest


def _type_of(content: bytes | Any) -> _TypeMeta:
    try:
        return _decode_type_meta(content)
    except ObjectError as error:
        problem = error.problem.replace("must be a mapping", "must be a Kubernetes object", 1)
        raise ObjectError(problem, error.field) from None


def _decode(manifest: ManifestKind, content: bytes | Any) -> DecodedObject:
    """Decode an object. The name is required; the namespace is `default` if missing. Raises `ObjectError`."""
    metadata = _decode_metadata(content).metadata
    if not metadata.name:
        raise ObjectError("is missing", ("metadata", "name"))
    if manifest.namespaced and not metadata.namespace:
        data = _parsed(content)
        content = {**data, "metadata": {**data["metadata"], "namespace": "default"}}
    return decode_object(manifest.kind, content)


def _parsed(content: bytes | Any) -> Any:
    if not isinstance(content, bytes | msgspec.Raw):
        return content
    try:
        return _decode_any(content)
    except ValueError as error:  # for example, if a number is too large for any type
        raise explain(error, content) from None


def _identity_of(item: _ManifestItem) -> Identity | None:
    """Return the identity of an invalid object, or None if its kind, version or name is not known."""
    manifest = MANIFEST_KINDS.get(item.kind)
    if manifest is None or item.api_version not in manifest.api_versions:
        return None
    try:
        metadata = _decode_metadata(item.content).metadata
    except ObjectError:
        return None
    if not metadata.name:
        return None
    return item.kind, (metadata.namespace or "default") if manifest.namespaced else "", metadata.name


def _name_of(item: _ManifestItem) -> str:
    try:
        metadata = _decode_metadata(item.content).metadata
    except ObjectError:
        return item.kind
    if not item.kind:
        return ""
    manifest = MANIFEST_KINDS.get(item.kind)
    namespaced = manifest is None or manifest.namespaced
    return _label((item.kind, (metadata.namespace or "default") if namespaced else "", metadata.name)).strip()


def _label(identity: Identity) -> str:
    kind, namespace, name = identity
    return f"{kind} {namespace}/{name}" if namespace and name else f"{kind} {name}"


def _duplicate_warning(identity: Identity, first: str, second: str) -> str:
    if first == second:
        return f"{_label(identity)} is defined more than once in {first}; using the last definition"
    return f"{_label(identity)} is defined in {first} and in {second}; using the definition in {second}"
