"""`kubectl kproxy`: run a kproxy command in the daemon's pod on one node, from a laptop."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

from kproxy.cli.console import CannotTellError, UsageError
from kproxy.cli.parser import OneLineParser, parse

LABEL = "app.kubernetes.io/name=kproxy"
CONTAINER = "kproxy"
USAGE = "kubectl kproxy [--node=NODE] [--namespace=NAMESPACE] COMMAND [FLAGS]"
DESCRIPTION = """\
Run a kproxy command in the daemon's pod on a node of the cluster. Without
--node, any node with a ready pod is used."""
EPILOG = """\
examples:
  # is the proxy of this node healthy?
  kubectl kproxy --node=node-1 status
  # any node
  kubectl kproxy status
  # why does this Service not work on this node?
  kubectl kproxy --node=node-1 explain shop/api
  # everything for a bug report, in a file on this computer
  kubectl kproxy --node=node-1 bundle - > bundle.tar.gz

Other flags of kubectl, such as --context, can be given before COMMAND, too.
Needs the permission to list pods and to run commands in them. For explain, the
plugin reads the Service, EndpointSlices, Pods, NetworkPolicies and Nodes with
your kubeconfig, because the daemon has no permission to read all of them, and
passes the fields that explain uses to the command in the pod. What you may not
read is listed in the output."""
KUBECTL_FLAGS = ("context", "kubeconfig", "cluster", "user", "server", "as")
"""Flags that are passed on to kubectl."""


class DaemonPod(NamedTuple):
    """A pod of the daemon, and the node that it runs on."""

    name: str
    node: str


def main() -> int:
    """Run the plugin. Return 2 for invalid usage, 3 if no pod runs; otherwise, the command takes over the process."""
    try:
        _run(sys.argv[1:])
    except UsageError as error:
        code, text = 2, str(error)
    except CannotTellError as error:
        code, text = 3, str(error)
    except (OSError, ValueError, KeyError) as error:
        code, text = 3, f"cannot use kubectl: {error!r}"
    except KeyboardInterrupt:
        return 130
    sys.stderr.write(f"kubectl kproxy: {text}\n")
    return code


def _run(arguments: Sequence[str]) -> None:
    options, command = _parse(arguments)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise CannotTellError("cannot find the program kubectl")
    access = [f"--{name}={value}" for name in KUBECTL_FLAGS if (value := getattr(options, name))]
    namespace = f"--namespace={options.namespace}"
    listing = [kubectl, "get", "pods", *access, namespace, f"--selector={LABEL}", "--output=json"]
    if options.node:
        listing.append(f"--field-selector=spec.nodeName={options.node}")
    done = subprocess.run(listing, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own kubectl
    if done.returncode:
        raise CannotTellError(f"kubectl cannot list the pods: {done.stderr.strip().rpartition(chr(10))[2]}")
    pod = choose_pod(json.loads(done.stdout)["items"], options.node, options.namespace)
    objects = _cluster_objects(kubectl, access, command, pod.node) if command[0] == "explain" else None
    if objects is not None:
        flags = ["--stdin"]
        command.insert(1, "--cluster-objects=-")
        _replace_stdin(objects)
    else:
        flags = ["--stdin", "--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    run = [kubectl, "exec", *access, namespace, *flags, pod.name, f"--container={CONTAINER}", "--", "kproxy", *command]
    os.execv(kubectl, run)  # noqa: S606 - so that signals and the exit code are those of the command


def _cluster_objects(kubectl: str, access: Sequence[str], command: Sequence[str], node: str) -> bytes | None:
    """Return what the caller may read about the Service that `kproxy explain` is to explain.

    Return None if the command reads other sources of objects, prints its help, or is invalid: then the command in the
    pod says so.
    """
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            options = parse(command)
    except SystemExit:
        return None
    if options.objects or options.cluster_objects or getattr(options, "kubeconfig", None):
        return None
    from kproxy.cli.explain import service_key
    from kproxy.cli.kubectl_objects import read_with_kubectl
    from kproxy.diagnose.caller_objects import encode_objects

    key = service_key(options.service)
    return encode_objects(read_with_kubectl(kubectl, access, key, node, all_nodes=bool(options.client)), key)


def _replace_stdin(content: bytes) -> None:
    """Make a temporary file with this content the standard input of this process, and of the one that replaces it."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        file.seek(0)
        os.dup2(file.fileno(), 0)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        "kubectl kproxy",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--node", metavar="NODE", help="the node to examine")
    parser.add_argument(
        "-n", "--namespace", metavar="NAMESPACE", default="kube-system", help="the namespace of kproxy (kube-system)"
    )
    for name in KUBECTL_FLAGS:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its flags")
    options = parser.parse_args(arguments)
    if not options.command:
        raise UsageError("no COMMAND is given, for example: kubectl kproxy status")
    return options, list(options.command)


def choose_pod(pods: Sequence[Mapping[str, Any]], node: str | None, namespace: str) -> DaemonPod:
    """Return the pod to use: a ready one, if there is any. Raises `CannotTellError` if there is no pod."""
    running = [
        pod
        for pod in pods
        if pod.get("status", {}).get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
    ]
    if not running:
        where = f" on node {node}" if node else ""
        waiting = f" ({len(pods)} of them do not run)" if pods else ""
        raise CannotTellError(f"no pod with the label {LABEL} runs in namespace {namespace}{where}{waiting}")
    best = min(running, key=lambda pod: (not _is_ready(pod), pod["metadata"]["name"]))
    return DaemonPod(str(best["metadata"]["name"]), str(best.get("spec", {}).get("nodeName", "")))


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)
