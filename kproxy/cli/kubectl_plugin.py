"""`kubectl kproxy`: run a kproxy command in the daemon's pod on one node, from a laptop."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kproxy.cli.console import CannotTellError, UsageError
from kproxy.cli.parser import OneLineParser

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
  # everything for a bug report, in a file on this computer
  kubectl kproxy --node=node-1 bundle - > bundle.tar.gz

Other flags of kubectl, such as --context, can be given before COMMAND, too.
Needs the permission to list pods and to run commands in them."""
KUBECTL_FLAGS = ("context", "kubeconfig", "cluster", "user", "server", "as")
"""Flags that are passed on to kubectl."""


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
    access.append(f"--namespace={options.namespace}")
    listing = [kubectl, "get", "pods", *access, f"--selector={LABEL}", "--output=json"]
    if options.node:
        listing.append(f"--field-selector=spec.nodeName={options.node}")
    done = subprocess.run(listing, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own kubectl
    if done.returncode:
        raise CannotTellError(f"kubectl cannot list the pods: {done.stderr.strip().rpartition(chr(10))[2]}")
    pod = choose_pod(json.loads(done.stdout)["items"], options.node, options.namespace)
    terminal = ["--stdin", "--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    run = [kubectl, "exec", *access, *terminal, pod, f"--container={CONTAINER}", "--", "kproxy", *command]
    os.execv(kubectl, run)  # noqa: S606 - so that signals and the exit code are those of the command


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


def choose_pod(pods: Sequence[Mapping[str, Any]], node: str | None, namespace: str) -> str:
    """Return the name of the pod to use: a ready one, if there is any. Raises `CannotTellError` if there is no pod."""
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
    return str(best["metadata"]["name"])


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)
