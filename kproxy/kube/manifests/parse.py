"""From the texts of files to the Services, EndpointSlices, Nodes and ServiceCIDRs in them. Pure: reads no file.

What `kubectl get -o yaml` or `-o json` prints works, and what the API server answers: single objects, `List`,
`ServiceList` and its like (whose items have no kind of their own), several YAML documents in a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import Struct

from kproxy.documents.document import Document, DocumentError, FileProblem, field_path_text
from kproxy.documents.document import FieldPath as Path
from kproxy.documents.parse import read_documents
from kproxy.kube.codec.conversion import DecodedObject, ObjectError, ignored_fields_text
from kproxy.kube.codec.json_codec import decode_object
from kproxy.model.delta import Kind, Object, Replace
from kproxy.model.types import EndpointSlice, Node, Protocol, Service, ServiceCIDR

Decode: TypeAlias = Callable[[dict[str, Any]], object]
_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]|(\[\.\.\.\])")
_ANY = object()
"""The step `[...]`: some element of a list or mapping, the complaint does not say which."""


def explain(error: ObjectError, data: Any, decode: Decode) -> tuple[Path, str]:
    """Return the path of the field that an object was refused for, and what is wrong with it.

    `data` is the object as parsed; `decode` is what refused it, called again to find out which of several
    elements is meant.
    """
    match = _PLACE.match(str(error))
    assert match is not None
    what = match["what"]
    if what.startswith("Invalid enum value"):
        what += f", expected one of {', '.join(get_args(Protocol))}"
    if match["key"]:
        what = f"{what} as a key"
    steps = [name or (int(index) if index else _ANY) for name, index, _ in _STEP.findall(match["path"] or "")]
    return _resolve(steps, data, decode, str(error)), what[:1].lower() + what[1:]


def _resolve(steps: list[Any], data: Any, decode: Decode, complaint: str) -> Path:
    """Replace each unknown step: it is the element that alone, without its siblings, brings the complaint."""
    real: list[str | int] = []
    here: list[str | int] = []
    for step in steps:
        if step is not _ANY:
            real.append(step)
            here.append(step)
            continue
        found = _guilty(data, here, decode, complaint)
        if found is None:
            break
        key, data = found
        real.append(key)
        here.append(key if isinstance(key, str) else 0)
    return tuple(real)


def _guilty(
    data: Any, path: list[str | int], decode: Decode, complaint: str
) -> tuple[str | int, dict[str, Any]] | None:
    container = _at(data, path)
    if isinstance(container, list):
        alone: list[tuple[str | int, Any]] = [(index, [element]) for index, element in enumerate(container)]
    elif isinstance(container, dict):
        alone = [(key, {key: element}) for key, element in container.items()]
    else:
        alone = []
    for key, only in alone:
        candidate = _replaced(data, path, only)
        try:
            decode(candidate)
        except ObjectError as error:
            if str(error) == complaint:
                return key, candidate
    return None


def _at(data: Any, path: list[str | int]) -> Any:
    for step in path:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def _replaced(data: Any, path: list[str | int], value: Any) -> Any:
    if not path:
        return value
    copy = data.copy()
    copy[path[0]] = _replaced(data[path[0]], path[1:], value)
    return copy


class ManifestKind(Struct, frozen=True):
    """A kind that decides rules: its type, the apiVersions it may have (the usual one first), and its scope."""

    kind: Kind
    api_versions: tuple[str, ...]
    namespaced: bool = True


SERVED = {
    "Service": ManifestKind(Service, ("v1",)),
    "EndpointSlice": ManifestKind(EndpointSlice, ("discovery.k8s.io/v1",)),
    "Node": ManifestKind(Node, ("v1",), namespaced=False),
    "ServiceCIDR": ManifestKind(ServiceCIDR, ("networking.k8s.io/v1", "networking.k8s.io/v1beta1"), namespaced=False),
}
"""The kinds that decide rules, by their name in files."""
Identity: TypeAlias = tuple[str, str, str]
"""What tells objects apart: kind, namespace ("" for Nodes and ServiceCIDRs) and name."""


class ManifestFile(Struct, frozen=True):
    """What one file holds, in its order. `passed_over` names the kinds kproxy has no use for.

    An object that gets no rules (a headless Service) is None. `remarks` name parts of objects that are left out, on a
    line each. A file with `problems` is not to be used.
    """

    path: str
    objects: tuple[tuple[Identity, Object | None], ...] = ()
    passed_over: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()
    remarks: tuple[str, ...] = ()


class LoadedManifests(Struct, frozen=True):
    """The objects of several files, with what a user should know of them, a line each.

    `replacements` has one entry for each kind of `SERVED`, in its order, also where there are none.
    `notes` tell of kinds that were passed over, `warnings` of objects that are given more than once and of parts of
    objects that are left out.
    """

    replacements: tuple[Replace, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[FileProblem, ...] = ()


def load_objects(texts: Mapping[str, bytes]) -> LoadedManifests:
    """Return the objects of the files whose path and text are given. Files with problems give none."""
    return combine(parse_file(path, text) for path, text in texts.items())


def combine(files: Iterable[ManifestFile]) -> LoadedManifests:
    """Put files together. Of an object that is in two of them, the later in the order of paths is taken."""
    found: dict[Identity, tuple[str, Object | None]] = {}
    notes: list[str] = []
    warnings: list[str] = []
    problems: list[FileProblem] = []
    for file in sorted(files, key=lambda file: file.path):
        problems.extend(file.problems)
        if file.problems:
            continue
        notes.extend(f"{file.path}: passed over: {kind}" for kind in file.passed_over)
        warnings.extend(file.remarks)
        for identity, item in file.objects:
            earlier = found.pop(identity, None)
            if earlier is not None:
                warnings.append(f"{_label(identity)} is in {earlier[0]} and in {file.path}: the latter is taken")
            found[identity] = (file.path, item)
    kept = [item for _, item in found.values() if item is not None]
    ignored = Counter(kind for (kind, _, _), (_, item) in found.items() if item is None)
    replacements = [
        Replace(served.kind, tuple(item for item in kept if type(item) is served.kind), ignored=ignored[name])
        for name, served in SERVED.items()
    ]
    return LoadedManifests(tuple(replacements), tuple(notes), tuple(warnings), tuple(problems))


def parse_file(path: str, text: bytes) -> ManifestFile:
    """Decode the text of one file. `path` names it in problems; `.json` at its end says that it is JSON."""
    try:
        documents = read_documents(text, json=path.endswith(".json"))
    except DocumentError as error:
        return ManifestFile(path, problems=(FileProblem(path, str(error), error.line, error.column),))
    reading = _FileParser(path)
    for document in documents:
        reading.add(document)
    if not documents:
        reading.problem("holds no Kubernetes object")
    return ManifestFile(
        path,
        tuple(reading.objects),
        tuple(dict.fromkeys(reading.passed_over)),
        tuple(reading.problems),
        tuple(reading.remarks),
    )


class _TypeMeta(Struct, rename="camel"):
    api_version: str = ""
    kind: str = ""


class _TextItems(Struct):
    items: list[msgspec.Raw] | None = None


class _DataItems(Struct):
    items: list[Any] | None = None


class _ManifestMetadata(Struct):
    name: str = ""
    namespace: str = ""


class _NamedManifest(Struct):
    metadata: _ManifestMetadata


class _ManifestItem(Struct):
    """One object: JSON text or data, where it is in its document, and what a typed list says of its type."""

    content: bytes | Any
    at: tuple[str | int, ...]
    api_version: str = ""
    kind: str = ""


class _FileParser:
    """Gathers what the documents of one file hold."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.objects: list[tuple[Identity, Object | None]] = []
        self.passed_over: list[str] = []
        self.problems: list[FileProblem] = []
        self.remarks: list[str] = []

    def problem(self, message: str, line: int = 0) -> None:
        self.problems.append(FileProblem(self.path, message, line))

    def add(self, document: Document) -> None:
        """Take in one document: an object, or a list of them."""
        try:
            items = list(_items(document.content))
        except ObjectError as error:
            self._refuse(_ManifestItem(document.content, ()), error, document)
            return
        for item in items:
            try:
                self._add_item(item, document)
            except ObjectError as error:
                self._refuse(item, error, document)

    def _add_item(self, item: _ManifestItem, document: Document) -> None:
        served = _served(item)
        if served is None:
            self.passed_over.append(f"{item.api_version} {item.kind}".strip())
            return
        decoded = _decode(served, item.content)
        if decoded.remarks:
            line = document.line_of((*item.at, *decoded.remarks[0].field))
            text = f"{_name_of(item)}: left out what cannot be used: {ignored_fields_text(decoded.remarks)}"
            self.remarks.append(str(FileProblem(self.path, text, line)))
        namespace = decoded.namespace if served.namespaced else ""
        self.objects.append(((item.kind, namespace, decoded.name), decoded.object))

    def _refuse(self, item: _ManifestItem, error: ObjectError, document: Document) -> None:
        served = SERVED.get(item.kind, SERVED["Service"])
        try:
            field, message = explain(error, _data(item.content), partial(_decode, served))
        except ObjectError:
            field, message = (), str(error)
        text = ": ".join(part for part in (_name_of(item), field_path_text(field), message) if part)
        self.problem(text, document.line_of((*item.at, *field)))


def _items(content: bytes | Any) -> Iterator[_ManifestItem]:
    """Yield the objects of a document: the items of a list, or itself."""
    own = _type_of(content)
    if not own.kind:
        raise ObjectError("Expected a Kubernetes object, got one without a kind - at `$.kind`")
    if not own.kind.endswith("List"):
        yield _ManifestItem(content, (), own.api_version, own.kind)
        return
    typed = own.kind.removesuffix("List")
    if typed and typed not in SERVED:
        yield _ManifestItem(content, (), own.api_version, own.kind)
        return
    if isinstance(content, bytes):
        members: list[Any] | None = _read(content, _TextItems).items
    else:
        members = _read(content, _DataItems).items
    for index, item in enumerate(members or ()):
        yield _ManifestItem(item, ("items", index), own.api_version if typed else "", typed)


def _served(item: _ManifestItem) -> ManifestKind | None:
    """Complete the type of an item from its own text, and return the kind to decode it as, if any."""
    own = _type_of(item.content)
    item.kind = own.kind or item.kind
    item.api_version = own.api_version or item.api_version
    if not item.kind:
        raise ObjectError("Expected a Kubernetes object, got one without a kind - at `$.kind`")
    served = SERVED.get(item.kind)
    group, _, _ = item.api_version.rpartition("/")
    if served is None or (group and group != served.api_versions[0].rpartition("/")[0]):
        return None
    if item.api_version not in served.api_versions:
        found = repr(item.api_version) if item.api_version else "none"
        raise ObjectError(f"Expected `{served.api_versions[0]}`, got {found} - at `$.apiVersion`")
    return served


def _type_of(content: bytes | Any) -> _TypeMeta:
    try:
        return _read(content, _TypeMeta)
    except ObjectError as error:
        raise ObjectError(str(error).replace("`object`", "a Kubernetes object")) from None


def _decode(served: ManifestKind, content: bytes | Any) -> DecodedObject:
    """Decode an object of a file: one must have a name, and one without a namespace is in `default`."""
    names = _read(content, _NamedManifest).metadata
    if not names.name:
        raise ObjectError("Expected a name, got none - at `$.metadata.name`")
    if served.namespaced and not names.namespace:
        data = _data(content)
        content = {**data, "metadata": {**data["metadata"], "namespace": "default"}}
    return decode_object(served.kind, content)


def _data(content: bytes | Any) -> Any:
    if not isinstance(content, bytes | msgspec.Raw):
        return content
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:  # such as a number that fits no type
        raise ObjectError(str(error)) from None


def _name_of(item: _ManifestItem) -> str:
    try:
        names = _read(item.content, _NamedManifest).metadata
    except ObjectError:
        return item.kind
    if not item.kind:
        return ""
    served = SERVED.get(item.kind)
    namespaced = served is None or served.namespaced
    return _label((item.kind, (names.namespace or "default") if namespaced else "", names.name)).strip()


def _label(identity: Identity) -> str:
    kind, namespace, name = identity
    return f"{kind} {namespace}/{name}" if namespace and name else f"{kind} {name}"


_S = TypeVar("_S", bound=Struct)


def _read(content: bytes | Any, shape: type[_S]) -> _S:
    try:
        if isinstance(content, bytes | msgspec.Raw):
            return msgspec.json.decode(content, type=shape)
        return msgspec.convert(content, shape)
    except msgspec.DecodeError as error:
        raise ObjectError(str(error)) from None
