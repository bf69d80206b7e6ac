"""Read the objects that `kproxy explain` uses through kubectl, with the access of whoever runs it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from kproxy.diagnose.caller_objects import CallerObjects
from kproxy.diagnose.cluster_reader import TIMEOUT_SECONDS, ClusterReadError, read_cluster

SOURCE = "the kubeconfig of the caller of kubectl kproxy"
MAX_ANSWER_BYTES = 64 << 20
"""The maximum size of one answer, a page of a list."""
_SERVER_ERROR = re.compile(r"Error from server(?: \(\w+\))?: ")


def read_with_kubectl(
    kubectl: str, access: Sequence[str], key: str, node_name: str, *, all_nodes: bool = False
) -> CallerObjects:
    """Read the objects about the Service `key` on a node as `read_cluster` does. Problems are part of the result.

    `access` are flags of kubectl that choose the cluster and the user.
    """

    def get(path: str, query: Mapping[str, str]) -> tuple[bytes | None, str]:
        uri = f"{path}?{urlencode(query)}" if query else path
        return _run([kubectl, "get", f"--raw={uri}", f"--request-timeout={TIMEOUT_SECONDS:g}s", *access])

    try:
        return read_cluster(get, SOURCE, key, node_name, all_nodes=all_nodes)
    except ClusterReadError as error:
        return CallerObjects(SOURCE, problems=[f"with {SOURCE}: {error}"])


def _run(command: Sequence[str]) -> tuple[bytes | None, str]:
    """Return what kubectl prints, or None and the error of the API server. Raises `ClusterReadError` without one."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,  # noqa: S603 - the user's kubectl
    ):
        body = process.stdout.read(MAX_ANSWER_BYTES + 1) if process.stdout else b""
        if len(body) > MAX_ANSWER_BYTES:
            process.kill()
            return None, f"the answer has more than {MAX_ANSWER_BYTES >> 20} MiB"
        if process.wait() == 0:
            return body, ""
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    if not (found := _SERVER_ERROR.match(text)):
        raise ClusterReadError(f"kubectl: {text or f'exit code {process.returncode}'}")
    return None, text[found.end() :]
