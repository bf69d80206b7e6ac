"""Read and write kube-proxy's configuration file."""

from __future__ import annotations

from typing import Any

import msgspec

from kproxy.config.decode import (
    ConfigError,
    ConfigProblem,
    Locate,
    decode,
    duplicate_json_keys,
    encode,
    known_fields,
    must_be,
    parse_duration,
)
from kproxy.config.types import API_VERSION, KIND, Config, KproxySection
from kproxy.config.validation import HEALTHZ_PORT, METRICS_PORT, check, ineffective_settings, reject_retired_mode
from kproxy.documents.document import Document, DocumentError, FieldPath, field_path_text
from kproxy.documents.parse import read_documents
from kproxy.model.printable_text import printable

_TYPE = (API_VERSION, KIND)
_GATES: FieldPath = ("featureGates",)
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
"""Fields in which "", 0 and 0s mean that the field is unset. As in kube-proxy, they get their default values.

Configuration files that kubeadm writes contain many of these fields, set to zero values.
"""


def load_config(text: bytes, path: str, *, strict: bool = False) -> tuple[Config, list[str]]:
    """Parse the text of a configuration file, YAML or JSON. Return the configuration and one-line warnings.

    `path` is the name of the file. It appears in messages. If it ends in `.json`, the text must be JSON.

    As in kube-proxy, null means that a field is unset. In the fields in `_ZERO_IS_UNSET`, "" and 0 also mean this. For
    example, a `minSyncPeriod` of 0 becomes the default of 1 s; only the flag can set the field to 0.

    kube-proxy's lenient decoder ignores unknown fields, duplicate keys and additional documents. `load_config` returns
    a warning for each of them, or raises an error if `strict` is true.

    Raises `ConfigError`, with one line for each problem.
    """
    problems: list[ConfigProblem] = []
    document = _find_document(text, path, problems)

    def locate(field: FieldPath) -> str:
        return _location(path, document.line_of(field), field_path_text(field))

    data = _check_type(_data(document), locate)
    reject_retired_mode(data.get("mode"), locate)
    is_json = isinstance(document.content, bytes)
    duplicates = duplicate_json_keys(document.content) if is_json else document.duplicate_keys
    problems += (ConfigProblem(f"{locate(key)}: duplicate key", "the last value applies") for key in duplicates)
    fields = known_fields(Config, data, locate, problems)
    if fields.get("featureGates") == "":
        problems.append(ConfigProblem(f'{locate(_GATES)}: must be a mapping, not ""', "treated as unset"))
        del fields["featureGates"]
    if strict and problems:
        raise ConfigError("\n".join(problem.text for problem in problems))
    config = check(decode(Config, _default_addresses(_set_fields(fields)), locate), locate)
    return config, [problem.warning for problem in problems] + ineffective_settings(config, locate)


def to_yaml(config: Config) -> str:
    """Format a configuration as YAML that `load_config` can read.

    Two settings are lost because only flags can express them: a `minSyncPeriod` of 0, and a disabled server.
    """
    import yaml  # noqa: PLC0415 - only this and YAML files need PyYAML

    text: str = yaml.safe_dump(as_document(config), sort_keys=True)
    return text


def as_document(config: Config) -> dict[str, Any]:
    """Return the content of a configuration file that specifies `config`.

    The section `kproxy` is omitted if it has its default values, because kube-proxy does not know it. As in kube-proxy,
    `mode` is the effective mode, even if `config` does not set it.
    """
    document = {"apiVersion": API_VERSION, "kind": KIND, **encode(config), "mode": config.effective_mode}
    if config.kproxy == KproxySection():
        del document["kproxy"]
    return document


def _find_document(text: bytes, path: str, problems: list[ConfigProblem]) -> Document:
    """Return the document that contains the configuration. Add a problem to `problems` for every other document.

    If no document has the right `apiVersion` and `kind`, return the first one. Raises `ConfigError`.
    """
    try:
        documents = read_documents(text, json=path.endswith(".json"), allow_duplicate_keys=True)
    except DocumentError as error:
        position = "".join(f":{number}" for number in (error.line, error.column) if number)
        raise ConfigError(f"{printable(path)}{position}: {error}") from None
    if not documents:
        raise ConfigError(f"{printable(path)}: must contain a {KIND}, but is empty")
    types = [_type(document) for document in documents]
    chosen = types.index(_TYPE) if _TYPE in types else 0
    for document, (_, kind) in zip(documents, types, strict=True):
        if document is not documents[chosen]:
            what = (
                f"another {KIND}" if kind == KIND else f"document of kind {kind}" if kind else "document without a kind"
            )
            only = f"only the {'first one' if kind == KIND else KIND} is read"
            problems.append(ConfigProblem(_location(path, document.line_of(()), f"{what}; {only}")))
    return documents[chosen]


def _type(document: Document) -> tuple[str, str]:
    """Return the `apiVersion` and `kind` of a document. A value is "" if it is missing or not a string."""
    data = _data(document)
    fields = data if isinstance(data, dict) else {}
    version, kind = fields.get("apiVersion"), fields.get("kind")
    return version if isinstance(version, str) else "", kind if isinstance(kind, str) else ""


def _location(path: str, line: int, text: str) -> str:
    name = printable(path)
    return ": ".join(part for part in (f"{name}:{line}" if line else name, text) if part)


def _data(document: Document) -> object:
    return msgspec.json.decode(document.content) if isinstance(document.content, bytes) else document.content


def _check_type(data: object, locate: Locate) -> dict[str, Any]:
    """Check `apiVersion` and `kind`, and return the other fields."""
    if not isinstance(data, dict):
        raise must_be(locate(()), "a mapping", data)
    for name, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if name not in data:
            raise ConfigError(f"{locate(())}: {name} is missing; must be {expected}")
        if data[name] != expected:
            raise must_be(locate((name,)), expected, data[name])
    return {name: value for name, value in data.items() if name not in {"apiVersion", "kind"}}


def _set_fields(data: dict[str, Any], path: FieldPath = ()) -> dict[str, Any]:
    """Return the data without unset fields: null, and zero values of the fields in `_ZERO_IS_UNSET`."""
    fields = {}
    for name, value in data.items():
        field = (*path, name)
        if value is None or (field_path_text(field) in _ZERO_IS_UNSET and _is_zero(value)):
            continue
        fields[name] = _set_fields(value, field) if isinstance(value, dict) and field != _GATES else value
    return fields


def _is_zero(value: object) -> bool:
    if isinstance(value, str):
        try:
            return not value or parse_duration(value) == 0
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _default_addresses(data: dict[str, Any]) -> dict[str, Any]:
    """Add the IPv6 default addresses of the health and metrics servers if `bindAddress` is an IPv6 address.

    As in kube-proxy, the default addresses have the IP family of `bindAddress`. The defaults in `Config` are IPv4.
    """
    if ":" not in str(data.get("bindAddress", "")):
        return data
    servers = {"healthzBindAddress": f"[::]:{HEALTHZ_PORT}", "metricsBindAddress": f"[::1]:{METRICS_PORT}"}
    return servers | data
