"""The pages `/statusz` (KEP-4827) and `/flagz` (KEP-4828), as plain text or JSON (API group `config.k8s.io`). Pure.

The page "Kubernetes z-pages" of the Kubernetes 1.36 documentation defines the media types and the JSON fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus

from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, plain

NAME = "kproxy"
GROUP = "config.k8s.io"
VERSIONS = ("v1beta1", "v1alpha1")
"""The supported API versions of the kinds Statusz and Flagz. The fields are the same in both versions."""
EMULATION = "1.38"
"""The Kubernetes version of the kube-proxy that kproxy replaces."""


def statusz(
    *,
    started: float,
    up: Callable[[], float],
    binary_version: str,
    python_version: str,
    paths: Iterable[str],
) -> Handler:
    """Return the handler of `/statusz`.

    `started` is the time when the process started, in seconds since the epoch. `up` returns the number of seconds since
    then. `paths` are the paths of all pages on this port.
    """
    start = datetime.fromtimestamp(int(started), UTC)
    paths = sorted(paths)

    def text() -> str:
        seconds = int(up())
        lines = {
            "Started": f"{start:%a %b %e %H:%M:%S} UTC {start:%Y}",
            "Up": f"{seconds // 3600} hr {seconds // 60 % 60:02} min {seconds % 60:02} sec",
            "Python version": python_version,
            "Binary version": binary_version,
            "Emulation version": EMULATION,
            "Paths": " ".join(paths),
        }
        return "".join(f"{name}: {value}\n" for name, value in lines.items())

    def fields() -> dict[str, object]:
        return {
            "startTime": f"{start:%Y-%m-%dT%H:%M:%SZ}",
            "uptimeSeconds": int(up()),
            "binaryVersion": binary_version,
            "emulationVersion": EMULATION,
            "paths": paths,
        }

    return _page("statusz", "Statusz", text, fields)


def flagz(flags: Callable[[], Mapping[str, str]]) -> Handler:
    """Return the handler of `/flagz`, which shows the value of each flag by name."""

    def text() -> str:
        return "".join(f"{name}={value}\n" for name, value in sorted(flags().items()))

    return _page("flags", "Flagz", text, lambda: {"flags": dict(sorted(flags().items()))})


def _page(title: str, kind: str, text: Callable[[], str], fields: Callable[[], dict[str, object]]) -> Handler:
    structured = f"application/json;v={VERSIONS[0]};g={GROUP};as={kind}"
    head = f"\n{NAME} {title}\nWarning: this text may change; programs should request {structured}\n\n"

    def answer(request: HttpRequest) -> HttpResponse:
        version = negotiate(request.headers.get("accept", ""), kind)
        if version is None:
            message = f"not acceptable: available are text/plain and {structured}\n"
            return plain(HTTPStatus.NOT_ACCEPTABLE, message)
        if not version:
            return plain(HTTPStatus.OK, head + text())
        group = {"kind": kind, "apiVersion": f"{GROUP}/{version}", "metadata": {"name": NAME}}
        return json(HTTPStatus.OK, group | fields())

    return answer


def negotiate(accept: str, kind: str) -> str | None:
    """Return the API version of `kind` that an Accept header selects, or "" if the header selects plain text.

    Return None if the header accepts neither plain text nor a supported version.
    """
    if not accept.strip():
        return ""
    for media_type, parameters in _accepted(accept):
        if media_type in {"text/plain", "text/*", "*/*"}:
            if parameters.get("charset", "utf-8") == "utf-8" and parameters.keys() <= {"charset"}:
                return ""
        elif media_type == "application/json":
            version = parameters.get("v", "")
            if version in VERSIONS and parameters == {"v": version, "g": GROUP.lower(), "as": kind.lower()}:
                return version
    return None


def _accepted(accept: str) -> list[tuple[str, dict[str, str]]]:
    """Return the accepted media types and their parameters, in lower case.

    They are sorted by descending quality value (RFC 9110, section 12.5.1).
    """
    accepted = []
    for entry in accept.lower().split(","):
        media_type, *rest = (part.strip() for part in entry.split(";"))
        pairs = (part.partition("=") for part in rest if part)
        parameters = {name.strip(): value.strip().strip('"') for name, _, value in pairs}
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 1.0
        if quality > 0:
            accepted.append((quality, media_type, parameters))
    return [(media_type, parameters) for _, media_type, parameters in sorted(accepted, key=lambda each: -each[0])]
