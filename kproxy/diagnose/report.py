"""The reports that commands print as text, JSON or YAML. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

API_VERSION = "kproxy.dev/v1"
"""The version of the reports' schemas. It changes only if a field is removed or gets another meaning."""


class ReportPart(Struct, frozen=True, kw_only=True, rename="camel"):
    """A value in a report. Field names are in camelCase in JSON and YAML."""


class Report(ReportPart, frozen=True, kw_only=True):
    """A complete report. The name of its class is its `kind`, and `docs/schemas/` has a JSON schema of each kind."""


def document(report: Report) -> dict[str, Any]:
    """Return a report as values that JSON and YAML can represent, with its `apiVersion` and `kind`."""
    return {
        "apiVersion": API_VERSION,
        "kind": type(report).__name__,
        **msgspec.json.decode(msgspec.json.encode(report)),
    }


def schema(kind: type[Report]) -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a kind of report."""
    (reference,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    own = components.pop(reference["$ref"].rpartition("/")[2])
    properties = {"apiVersion": {"const": API_VERSION}, "kind": {"const": kind.__name__}, **own["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **own,
        "properties": properties,
        "required": ["apiVersion", "kind", *own["required"]],
        "additionalProperties": False,
        "$defs": components,
    }
