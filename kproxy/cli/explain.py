"""`kproxy explain`: say why a Service works on this node or does not, and what to do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kproxy.cli.console import CannotTellError, UsageError
from kproxy.cli.control_client import fetch_service
from kproxy.cli.options import DAEMON_GROUPS, OBJECTS_HELP, SYNTAX, load_settings
from kproxy.cli.output import ExitCode, add_output_flag, show_report
from kproxy.cli.parser import COMMANDS, HelpFormatter
from kproxy.config.flags import add_flags

if TYPE_CHECKING:
    from kproxy.config import Config
    from kproxy.diagnose.caller_objects import CallerObjects
    from kproxy.diagnose.cluster_objects import ClusterObjects
    from kproxy.diagnose.explain_facts import Facts
    from kproxy.diagnose.explain_report import ExplainSource
    from kproxy.model.context import Context
    from kproxy.model.service_state import ServiceState
    from kproxy.model.types import Family, Node

EPILOG = f"""\
examples:
  # on a node: why does this Service not work here?
  kproxy explain shop/api
  # what does this client get?
  kproxy explain shop/api --from=203.0.113.7
  # without a cluster: from files, for the node named node-1
  kubectl get svc,endpointslices,nodes,pods,netpol -A -o yaml > all.yaml
  kproxy explain shop/api --objects=all.yaml --hostname-override=node-1
  # the reason as a stable code, for scripts
  kproxy explain shop/api -o json | jq -r .reason.code

Facts come from all sources that can be read: the kproxy daemon on this node;
the API server, with your own kubeconfig; and, as root, the rules and tracked
connections in the kernel. With --objects, only the files are read, and the
kernel if --kernel is given. The output says what could not be seen.

On another computer, `kubectl kproxy --node=NODE explain SERVICE` runs this
command in the daemon's pod on a node. It reads the API server with your
kubeconfig there, and passes the objects on with --cluster-objects.

{SYNTAX}
Flags that set the configuration matter without a daemon: the mode and settings
such as --nodeport-addresses. --kubeconfig is your own, not that of the daemon.

Exit codes: 0 the Service works, 1 it does not or only in part, 2 the command
line is invalid, 3 no source of facts could be read."""

CLUSTER_OBJECTS_HELP = (
    "what `kubectl kproxy explain` has read from the API server with the kubeconfig of its caller; - is standard input"
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the argument parser."""
    parser = commands.add_parser(
        "explain",
        help=COMMANDS["explain"],
        usage="kproxy explain NAMESPACE/SERVICE [--from=ADDRESS] [FLAGS]",
        description="Say why a Service works on this node or does not, and what to do.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("service", metavar="NAMESPACE/SERVICE", help="the Service; without a namespace: default")
    parser.add_argument("--from", dest="client", metavar="ADDRESS", help="IP address of a client: say what it gets")
    parser.add_argument("--objects", metavar="PATH", help=f"{OBJECTS_HELP}; Pods and NetworkPolicies are used, too")
    parser.add_argument("--cluster-objects", metavar="FILE", help=CLUSTER_OBJECTS_HELP)
    parser.add_argument(
        "--kernel",
        metavar="BOOL",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="compare with the rules in the kernel (default: true as root, false with --objects)",
    )
    add_output_flag(parser)
    add_flags(parser, once=True, hidden=DAEMON_GROUPS)
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from kproxy.cli.explain_text import explanation_lines
    from kproxy.diagnose.explain import explain

    key, client = service_key(options.service), _client_address(options.client)
    if options.objects and options.cluster_objects:
        raise UsageError("--objects and --cluster-objects cannot be combined")
    config = load_settings(options)
    report = explain(gather(options, config, key, fetch_service), client)
    show_report(report, options.output, lambda style: explanation_lines(report, style))
    return ExitCode.WORKS if report.verdict == "WORKS" else ExitCode.BROKEN


def service_key(text: str) -> str:
    """Return the key of the Service that a command line names. Raises `UsageError`."""
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        raise UsageError(f"the Service must be NAMESPACE/NAME or NAME, not {text!r}")
    return f"{namespace or 'default'}/{name}"


def _client_address(text: str | None) -> str:
    from kproxy.model.addresses import canonical_address

    if text is None:
        return ""
    address = canonical_address(text)
    if address is None:
        raise UsageError(f"--from must be an IP address, not {text!r}")
    return address


def gather(
    options: argparse.Namespace,
    config: Config,
    key: str,
    fetch_service: Callable[[str], ServiceState] | None = None,
) -> Facts:
    """Read all facts about a Service that can be read.

    `fetch_service` asks the daemon; it raises `CannotTellError` if no daemon answers. Raises `CannotTellError` if no
    source of facts can be read.
    """
    from msgspec.structs import replace

    from kproxy.app.node_settings import local_node_name
    from kproxy.diagnose.explain_facts import Facts
    from kproxy.diagnose.explain_report import ExplainSource

    node_name = local_node_name(config)
    sources: list[ExplainSource] = []
    daemon = None if options.objects else _ask_daemon(key, fetch_service, sources)
    if daemon is not None:
        node_name, config = daemon.node_name, _in_mode(config, daemon.mode)
    objects = (
        _read_files(options.objects, key, sources) if options.objects else _read_api(options, key, node_name, sources)
    )
    if objects is not None and objects.slices is None and daemon is None and not options.objects:
        objects = None  # without EndpointSlices, the answer would be wrong
    if objects is None and daemon is None:
        reasons = "; ".join(f"{each.name}: {each.detail}" for each in sources if not each.used)
        raise CannotTellError(f"cannot explain {key}: no source of facts could be read: {reasons}; use --objects=PATH")
    node = next((each for each in (objects.nodes or ()) if each.name == node_name), None) if objects else None
    facts = Facts(
        key=key,
        mode=config.effective_mode,
        node_name=node_name,
        contexts=_contexts(config, node_name, node, objects),
        objects=objects,
        live=objects is not None and not options.objects,
        daemon=daemon,
        sources=tuple(sources),
    )
    if options.kernel != "true" and (options.objects or options.kernel == "false"):
        return facts
    if options.kernel != "true" and daemon is None and facts.node is None:
        detail = f"not compared: this machine is no node of the cluster: there is no Node {node_name}"
        return replace(facts, sources=(*facts.sources, ExplainSource(name="kernel", used=False, detail=detail)))
    from kproxy.diagnose.kernel_facts import with_kernel
    from kproxy.iptables.variant import use_host_variant

    use_host_variant(os.environ)
    return with_kernel(facts, whole=daemon is not None)


def _in_mode(config: Config, mode: str) -> Config:
    from msgspec.structs import replace

    return replace(config, mode=mode)


def _ask_daemon(
    key: str, fetch_service: Callable[[str], ServiceState] | None, sources: list[ExplainSource]
) -> ServiceState | None:
    from kproxy.diagnose.explain_report import ExplainSource

    if fetch_service is None:
        return None
    try:
        state = fetch_service(key)
    except CannotTellError as error:
        sources.append(ExplainSource(name="daemon", used=False, detail=str(error)))
        return None
    sources.append(ExplainSource(name="daemon", used=True, detail=f"kproxy on {state.node_name}, {state.mode} mode"))
    return state


def _read_files(path: str, key: str, sources: list[ExplainSource]) -> ClusterObjects:
    from kproxy.diagnose.explain_report import ExplainSource
    from kproxy.diagnose.object_files import ObjectFilesError, read_object_files

    try:
        objects = read_object_files(path)
    except ObjectFilesError as error:
        raise CannotTellError(str(error)) from None
    if objects.slices is None and objects.service(key) is not None:
        raise CannotTellError(f"cannot explain {key}: {path} contains no EndpointSlices at all, so nothing is known")
    sources.append(ExplainSource(name="objects", used=True, detail=path))
    return objects


def _read_api(
    options: argparse.Namespace, key: str, node_name: str, sources: list[ExplainSource]
) -> ClusterObjects | None:
    """Return the objects that the API server has, read with the caller's own credentials, or None."""
    from kproxy.diagnose.cluster_reader import ClusterReadError, own_kubeconfig, read_with_kubeconfig
    from kproxy.diagnose.explain_report import ExplainSource

    try:
        if options.cluster_objects:
            found = _read_cluster_objects(options.cluster_objects)
        else:
            kubeconfig = own_kubeconfig(getattr(options, "kubeconfig", None), os.environ)
            found = read_with_kubeconfig(kubeconfig, key, node_name, all_nodes=bool(options.client))
    except ClusterReadError as error:
        sources.append(ExplainSource(name="API server", used=False, detail=str(error)))
        return None
    if found.objects is not None:
        sources.append(ExplainSource(name="API server", used=True, detail=found.source))
    sources += (ExplainSource(name="API server", used=False, detail=problem) for problem in found.problems)
    return found.decoded()


def _read_cluster_objects(path: str) -> CallerObjects:
    """Read what `kubectl kproxy` has read from the API server. Standard input need not end after it."""
    from kproxy.diagnose.caller_objects import MAX_BYTES, CallerObjectsError, decode_objects

    where = "standard input" if path == "-" else path
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            line = file.readline(MAX_BYTES + 1)
    except OSError as error:
        raise CannotTellError(f"--cluster-objects: cannot read {where}: {error.strerror}") from None
    if len(line) > MAX_BYTES:
        raise CannotTellError(f"--cluster-objects: {where} has more than {MAX_BYTES >> 20} MiB")
    try:
        return decode_objects(line)
    except CallerObjectsError as error:
        raise CannotTellError(f"--cluster-objects: {where}: {error}") from None


def _contexts(
    config: Config, node_name: str, node: Node | None, objects: ClusterObjects | None
) -> dict[Family, Context]:
    """Return the contexts of this node without a daemon. Its addresses are assumed to be those of its Node object."""
    from msgspec.structs import replace

    from kproxy.app.family_contexts import assumed_context
    from kproxy.model.addresses import family_of
    from kproxy.model.types import Family

    contexts = {}
    cidrs = objects.service_cidrs if objects else ()
    for family in Family:
        context = assumed_context(config, family, node_name, node)
        contexts[family] = replace(context, service_cidrs=tuple(each for each in cidrs if family_of(each) is family))
    return contexts
