"""Parse YAML as `kubectl` does: dates and `12:30` are strings, `on` and `yes` are booleans, `010` is octal. Pure.

A key that occurs twice in one mapping is an error, as in the API server, unless the caller allows duplicate keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import yaml

from kproxy.documents.document import Document, DocumentError, FieldPath

MAX_DEPTH = 500
"""Maximum nesting depth, which is far deeper than that of any Kubernetes object.

The depth is checked only if the text has more flow collections and compact sequences (`- - a`) than this number.
"""
MAX_EXPANSION = 100_000
"""Maximum number of values by which aliases (`*name`) and merges (`<<`) may enlarge a document.

Without a limit, a text of 1 KB could expand to billions of values, because each alias repeats everything below its
anchor, including other aliases.
"""
_OPENINGS = re.compile(r"[\[{]|[-?][ \t]+(?=[-?])")
_MERGE_TAG = "tag:yaml.org,2002:merge"
# The types of plain (unquoted) scalars: the types of YAML 1.1 except base-60 numbers, dates and "=", which Kubernetes'
# YAML library does not support either. Each type has a pattern that its scalars match, and the characters with which
# they can begin. NUL stands for the empty scalar.
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


def read_yaml(text: str, *, allow_duplicate_keys: bool = False) -> list[Document]:
    """Return the documents of YAML text, except empty documents. Raises `DocumentError`.

    A key that occurs more than once in a mapping is an error; with `allow_duplicate_keys`, it is instead listed in
    `Document.duplicate_keys`.
    """
    try:
        _check_depth(text)
        documents = _documents(_loader()(text), allow_duplicate_keys, has_aliases="*" in text)
        return [document for document in documents if document.content is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        position = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise DocumentError(f"not valid YAML: {problem}", *position) from None
    except yaml.reader.ReaderError as error:
        line = text.encode().count(b"\n", 0, error.position) + 1
        raise DocumentError(f"not valid YAML: {error.reason}", line) from None
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except (ValueError, LookupError):  # PyYAML raises these for values such as `!!int x` and `!!bool x`
        raise DocumentError("not valid YAML: a value does not match its tag") from None


def line_in_yaml(text: str, path: FieldPath) -> int:
    """Return the 1-based line number of a field in the text of one document, or 0 if it is unknown.

    For a missing field, the result is the line of the nearest enclosing field that exists.

    The nesting depth of the text is not checked. The caller must already have parsed the text successfully.
    """
    try:
        node = yaml.compose(text, Loader=_loader())
    except yaml.YAMLError:
        return 0
    return 0 if node is None else _line(node, path)


def _check_depth(text: str) -> None:
    """Raise `RecursionError` for text whose nesting could make libyaml's recursion overflow the C stack.

    Nesting by indentation alone is not checked: its text grows with the square of the depth, so only an unrealistically
    large file could overflow the stack.
    """
    if len(_OPENINGS.findall(text)) <= MAX_DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecursionError


def _documents(loader: Any, allow_duplicate_keys: bool, *, has_aliases: bool) -> Iterator[Document]:
    while loader.check_node():
        root = loader.get_node()
        if has_aliases:
            _check_expansion(root)
        duplicates = list(_duplicate_keys(root))
        if duplicates and not allow_duplicate_keys:
            _, key = duplicates[0]
            raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value!r}", key.start_mark)
        paths = dict.fromkeys((*_path_to(mapping, root), key.value) for mapping, key in duplicates)
        yield Document(loader.construct_document(root), partial(_line, root), tuple(paths))


def _check_expansion(root: yaml.Node) -> None:
    """Raise `MarkedYAMLError` if aliases enlarge a document by more than `MAX_EXPANSION` values.

    An alias of a value that contains it counts as one value, because nothing follows it without an end.
    """
    sizes: dict[int, int] = {}  # number of values at and below each node, counting those of aliases as copies
    open_nodes: set[int] = set()
    pending = [root]
    while pending:
        node = pending[-1]
        children = _children(node)
        if id(node) in sizes:
            pending.pop()
        elif id(node) in open_nodes:  # all children have been visited
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in children)
            if sizes[id(node)] > len(sizes) + MAX_EXPANSION:
                problem = f"aliases and merges add more than {MAX_EXPANSION:,} values"
                raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
            pending.pop()
        else:
            open_nodes.add(id(node))
            pending.extend(child for child in children if id(child) not in open_nodes)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    return [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else []


def _line(node: yaml.Node, path: FieldPath) -> int:
    mark = node.start_mark
    for step in path:
        if isinstance(node, yaml.MappingNode):
            matches = [(key, value) for key, value in node.value if key.value == step]
            if not matches:
                break
            key, node = matches[-1]
            mark = key.start_mark
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            mark = node.start_mark
        else:
            break
    return int(mark.line) + 1


def _duplicate_keys(root: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.ScalarNode]]:
    """Yield each repeated key with its mapping. PyYAML itself does not report repeated keys: it uses the last value."""
    visited: set[int] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) in visited or isinstance(node, yaml.ScalarNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
            continue
        keys: set[str] = set()
        for key, value in node.value:
            pending.append(value)
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in keys:
                    yield node, key
                keys.add(key.value)


def _path_to(target: yaml.Node, root: yaml.Node) -> FieldPath:
    """Return a path from `root` to `target`. This may search the whole document: use it only to report problems."""
    visited: set[int] = set()
    pending: list[tuple[yaml.Node, FieldPath]] = [(root, ())]
    while pending:
        node, path = pending.pop()
        if node is target:
            return path
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += ((child, (*path, index)) for index, child in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            pending += ((child, (*path, str(key.value))) for key, child in node.value)
    raise LookupError("the target node is not below the root node")


@cache
def _loader() -> Any:
    """Return a loader class for the types in `_PLAIN_SCALARS`.

    It uses libyaml's parser if PyYAML was built with libyaml.
    """
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("KubernetesLoader", (base,), {"yaml_implicit_resolvers": {}})
    for name, (pattern, first) in _PLAIN_SCALARS.items():
        starts = ["" if letter == "\0" else letter for letter in first]
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), starts)
    loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    return loader
