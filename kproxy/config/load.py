"""Reading and writing kube-proxy's configuration file."""

from __future__ import annotations

from typing import Any

import msgspec

from kproxy.config.decode import (
    ConfigError,
    ConfigProblem,
    Path,
    Place,
    decode,
    doubled_in_json,
    encode,
    known_fields,
    must_be,
    parse_duration,
)
from kproxy.config.types import API_VERSION, KIND, Config, KproxySection
from kproxy.config.validation import HEALTHZ_PORT, METRICS_PORT, check, refuse_retired_mode, warnings_of
from kproxy.documents.document import Document, DocumentError, field_path_text
from kproxy.documents.parse import read_documents

_ZERO_IS_UNSET = frozenset(
    {
        "bindAddress",
        "clientConnection.burst",
        "clientConnection.contentType",
        "clientConnection.qps",
        "configSyncPeriod",
        "detectLocalMode",
        "healthzBindAddress",
        "iptables.minSyncPeriod",
        "iptables.syncPeriod",
        "ipvs.syncPeriod",
        "logging.flushFrequency",
        "logging.format",
        "metricsBindAddress",
        "nftables.minSyncPeriod",
        "nftables.syncPeriod",
    }
)
"""Fields whose default kube-proxy also takes for "", 0 and 0s; files that kubeadm writes are full of these."""
_GATES: Path = ("featureGates",)


def load_config(text: bytes, path: str, *, strict: bool = False) -> tuple[Config, list[str]]:
    """Return the configuration in the text of a file (YAML or JSON), and warnings, a line each.

    `path` names the file in messages. As in kube-proxy null always means unset, and so do "" and 0 where they
    would make no sense (a `minSyncPeriod` of 0 is the default of 1 s; the flag can set 0), but a `mode` of "" is not
    the default. What kube-proxy's lenient decoding passes over is a warning: fields that it does not have, keys
    given more than once, documents after the first. With `strict` it is an error. Raises `ConfigError`, whose message
    then has a line for each of them.
    """
    problems: list[ConfigProblem] = []
    document = _document(text, path, problems)

    def place(at: Path) -> str:
        return _place(path, document.line_of(at), field_path_text(at))

    data = _typed(_data(document), place)
    refuse_retired_mode(data.get("mode"), place)
    doubled = doubled_in_json(document.content) if isinstance(document.content, bytes) else document.duplicate_keys
    problems += (ConfigProblem(f"{place(tuple(at))}: given more than once", "the last one counts") for at in doubled)
    fields = known_fields(Config, data, place, problems)
    if fields.get("featureGates") == "":
        problems.append(ConfigProblem(f'{place(_GATES)}: must be a mapping, not ""', "taken as unset"))
        del fields["featureGates"]
    if strict and problems:
        raise ConfigError("\n".join(problem.text for problem in problems))
    config = check(decode(Config, _default_addresses(_set_fields(fields)), place), place)
    return config, [problem.warning for problem in problems] + warnings_of(config, place)


def to_yaml(config: Config) -> str:
    """Return the text of a file that `load_config` reads as this configuration.

    What only flags can say is lost: a `minSyncPeriod` of 0, and servers that are turned off.
    """
    import yaml  # noqa: PLC0415 - only this and YAML files need PyYAML

    text: str = yaml.safe_dump(as_document(config), sort_keys=True)
    return text


def as_document(config: Config) -> dict[str, Any]:
    """Return the data of a file that says this configuration: one for kube-proxy, if section `kproxy` says nothing."""
    document = {"apiVersion": API_VERSION, "kind": KIND, **encode(config)}
    if config.kproxy == KproxySection():
        del document["kproxy"]
    return document


def _document(text: bytes, path: str, problems: list[ConfigProblem]) -> Document:
    """Return the document with the configuration; the others are added to `problems`."""
    try:
        documents = read_documents(text, json=path.endswith(".json"), allow_duplicate_keys=True)
    except DocumentError as error:
        place = "".join(f":{number}" for number in (error.line, error.column) if number)
        raise ConfigError(f"{path}{place}: {error}") from None
    if not documents:
        raise ConfigError(f"{path}: must hold a document of kind {KIND}, but is empty")
    kinds = [_type(document) for document in documents]
    chosen = kinds.index(_OURS) if _OURS in kinds else 0
    for document, (_, kind) in zip(documents, kinds, strict=True):
        if document is not documents[chosen]:
            what = (
                f"another {KIND}" if kind == KIND else f"document of kind {kind}" if kind else "document without a kind"
            )
            only = f"only the {'first one' if kind == KIND else KIND} is read"
            problems.append(ConfigProblem(_place(path, document.line_of(()), f"{what}; {only}")))
    return documents[chosen]


_OURS = (API_VERSION, KIND)


def _type(document: Document) -> tuple[str, str]:
    """Return the `apiVersion` and `kind` of a document, "" for what it has not."""
    data = _data(document)
    fields = data if isinstance(data, dict) else {}
    version, kind = fields.get("apiVersion"), fields.get("kind")
    return version if isinstance(version, str) else "", kind if isinstance(kind, str) else ""


def _place(path: str, line: int, what: str) -> str:
    return ": ".join(part for part in (f"{path}:{line}" if line else path, what) if part)


def _data(document: Document) -> object:
    return msgspec.json.decode(document.content) if isinstance(document.content, bytes) else document.content


def _typed(data: object, place: Place) -> dict[str, Any]:
    """Check the type of the document, and return its other fields."""
    if not isinstance(data, dict):
        raise must_be(place(()), "a mapping", data)
    for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if name not in data:
            raise ConfigError(f"{place(())}: {name} is missing: must be {wanted}")
        if data[name] != wanted:
            raise must_be(place((name,)), wanted, data[name])
    return {name: value for name, value in data.items() if name not in {"apiVersion", "kind"}}


def _set_fields(data: dict[str, Any], at: Path = ()) -> dict[str, Any]:
    found = {}
    for name, value in data.items():
        path = (*at, name)
        if value is None or (field_path_text(path) in _ZERO_IS_UNSET and _is_zero(value)):
            continue
        found[name] = _set_fields(value, path) if isinstance(value, dict) and path != _GATES else value
    return found


def _is_zero(value: object) -> bool:
    if isinstance(value, str):
        try:
            return not value or parse_duration(value) == 0
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _default_addresses(data: dict[str, Any]) -> dict[str, Any]:
    """Complete the addresses of servers: of the family of `bindAddress`, as kube-proxy does."""
    if ":" not in str(data.get("bindAddress", "")):
        return data
    servers = {"healthzBindAddress": f"[::]:{HEALTHZ_PORT}", "metricsBindAddress": f"[::1]:{METRICS_PORT}"}
    return servers | data
