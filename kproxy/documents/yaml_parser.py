"""YAML as `kubectl` reads it: dates and `12:30` stay strings, `on` and `yes` are booleans, `010` is octal.

A key given twice in one mapping is an error, as it is to the API server, unless the reader asks for such keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import yaml

from kproxy.documents.document import Document, DocumentError, FieldPath

MAX_DEPTH = 500
"""Levels of nesting that are accepted, far beyond those of any Kubernetes object."""
_OPENINGS = re.compile(r"[\[{]|[-?][ \t]+(?=[-?])")
_MERGE_TAG = "tag:yaml.org,2002:merge"
# YAML 1.1 without its base-60 numbers, dates and "=": Kubernetes' own YAML library has none of them.
_PLAIN_SCALARS = {
    "null": (r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    "bool": (r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    "int": (
        r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$",
        "-+0123456789",
    ),
    "float": (
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    "merge": (r"^<<$", "<"),
}


def read(text: str, *, doubled_keys: bool = False) -> list[Document]:
    """Return the documents of YAML text that are not empty. Raises `DocumentError`.

    With `doubled_keys`, keys given twice in one mapping are named in the documents; otherwise they are an error.
    """
    try:
        _refuse_depth(text)
        return [document for document in _documents(_loader()(text), doubled_keys) if document.content is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        place = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise DocumentError(f"not valid YAML: {problem}", *place) from None
    except yaml.reader.ReaderError as error:
        line = text.encode().count(b"\n", 0, error.position) + 1
        raise DocumentError(f"not valid YAML: {error.reason}", line) from None
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except (ValueError, LookupError):  # what PyYAML lets escape for the likes of `!!int x` and `!!bool x`
        raise DocumentError("not valid YAML: a value does not fit its tag") from None


def _refuse_depth(text: str) -> None:
    """Raise for text nested so deeply that libyaml's recursion would overrun the C stack."""
    if len(_OPENINGS.findall(text)) <= MAX_DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecursionError


def _documents(loader: Any, doubled_keys: bool) -> Iterator[Document]:
    while loader.check_node():
        node = loader.get_node()
        doubled = list(_doubled_keys(node))
        if doubled and not doubled_keys:
            _, key = doubled[0]
            raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
        paths = dict.fromkeys((*_path_to(mapping, node), key.value) for mapping, key in doubled)
        yield Document(loader.construct_document(node), partial(_line, node), tuple(paths))


def line_in(text: str, path: FieldPath) -> int:
    """Return the line (from 1) of a field in text of one document, 0 if that cannot be told."""
    try:
        node = yaml.compose(text, Loader=_loader())
    except yaml.YAMLError:
        return 0
    return 0 if node is None else _line(node, path)


def _line(node: yaml.Node, path: FieldPath) -> int:
    mark = node.start_mark
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == step]
            if not found:
                break
            key, node = found[-1]
            mark = key.start_mark
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            mark = node.start_mark
        else:
            break
    return int(mark.line) + 1


def _doubled_keys(top: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.ScalarNode]]:
    """Find mappings with a key given more than once, of which YAML parsers silently keep the last."""
    seen: set[int] = set()
    todo = [top]
    while todo:
        node = todo.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
            continue
        keys: set[str] = set()
        for key, value in node.value:
            todo.append(value)
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in keys:
                    yield node, key
                keys.add(key.value)


def _path_to(wanted: yaml.Node, top: yaml.Node) -> tuple[str | int, ...]:
    """Return a path that leads to a node below another one. It takes a search, and is only for what is wrong."""
    seen: set[int] = set()
    todo: list[tuple[yaml.Node, tuple[str | int, ...]]] = [(top, ())]
    while todo:
        node, path = todo.pop()
        if node is wanted:
            return path
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += ((child, (*path, index)) for index, child in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            todo += ((child, (*path, str(key.value))) for key, child in node.value)
    raise LookupError("the node is not below the other one")


@cache
def _loader() -> Any:
    """Make the loader class: libyaml's parser where PyYAML was built with it, our reading of plain scalars."""
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("KubernetesLoader", (base,), {"yaml_implicit_resolvers": {}})
    for name, (pattern, first) in _PLAIN_SCALARS.items():
        starts = ["" if letter == "\0" else letter for letter in first]
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), starts)
    loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    return loader
