"""Import rules: packages import only lower layers, and pure modules import only pure modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kproxy

ROOT = Path(kproxy.__file__).parent
MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

LAYERS = (
    {"__main__"},
    {"cli"},
    {"app", "diagnose"},
    {"sync", "config", "kube"},
    {"documents", "iptables", "nftables", "ipvs", "simulate", "serve"},
    {"host"},
    {"model"},
)
"""The packages of kproxy from top to bottom. A package may import itself and packages of lower layers, not those of
its own layer: the backends do not depend on each other, and the simulator does not depend on the backends that it
checks."""

ONLY_MODEL = {"host", "serve", "simulate"}

PURE = (
    "model.*",
    *(f"iptables.{name}" for name in ("names", "render", "base_rules", "save_restore", "ledger", "diff", "dispatch")),
    "iptables.chain_groups",
    *(f"iptables.{name}" for name in ("frontend_conflicts", "patch", "cleanup", "foreign_rules", "repair")),
    "iptables.rule_counters",
    *(
        f"nftables.{name}"
        for name in ("names", "comments", "ruleset", "elements", "base_table", "shared_chains", "render")
    ),
    *(
        f"nftables.{name}"
        for name in ("ledger", "transaction", "diff", "snapshot", "nft_syntax", "expressions", "encode", "rejection")
    ),
    "iptables.held_services",
    "nftables.isolation",
    "nftables.held_services",
    *(f"nftables.{name}" for name in ("service_chains", "rule_decoder")),
    *(f"nftables.{name}" for name in ("rule_content", "desired_table", "repair")),
    *(f"kube.codec.{name}" for name in ("schema", "object_error", "conversion", "json_codec", "protobuf")),
    *(
        "kube.codec.watch_events",
        "kube.codec.streams",
        "kube.codec.wire_format",
        "kube.codec.shapes",
        "kube.codec.contents",
    ),
    *("kube.client.chunked",),
    *("kube.listwatch.protocol", "kube.events.correlator", "kube.client.http_proxy"),
    *(
        "sync.schedule",
        "sync.quarantine",
        "sync.repair_schedule",
        "sync.family_sync",
        "sync.service_conditions",
        "sync.log_summary",
    ),
    *(
        "app.family_contexts",
        "app.node_port_addresses",
        "app.localhost_node_ports",
        "diagnose.report",
        "diagnose.status",
        "diagnose.anonymize",
        "kube.manifests.encode",
    ),
    *(f"diagnose.{name}" for name in ("facts", "finding", "paths", "processes", "legacy_save", "doctor")),
    *(f"diagnose.check_{name}" for name in ("platform", "rules", "network", "cluster")),
    "host.observed",
    *(f"diagnose.{name}" for name in ("explain", "explain_facts", "explain_notes", "explain_report", "client_view")),
    *(
        f"diagnose.{name}"
        for name in ("caller_objects", "cluster_objects", "endpoint_use", "pods", "port_case", "port_reasons")
    ),
    *(f"diagnose.{name}" for name in ("rejection_cause", "rules_problem", "service_problem")),
    "diagnose.top",
    *("iptables.desired_rules", "nftables.planned_table", "sync.planning", "diagnose.written_rules"),
    *(f"diagnose.difference{name}" for name in ("", "_iptables", "_nftables", "_objects", "_configuration")),
    *(f"diagnose.trace.{name}" for name in ("flow", "program", "iptables_save", "nft_text", "nft_values", "nft_rules")),
    *(f"diagnose.trace.{name}" for name in ("nft_syntax", "result", "walk", "dumps", "cluster_objects", "trace")),
    *(
        "config.types",
        "config.conntrack_sysctls",
        "serve.http",
        "serve.zpages",
        "host.netlink_message",
        "host.nf_tables_constants",
        "host.nf_tables_notifications",
        "documents.document",
        "documents.yaml_parser",
        "documents.parse",
        "kube.manifests.parse",
        "simulate.*",
    ),
)
IMPURE = {"os", "socket", "subprocess", "threading", "time", "pathlib", "random", "logging"}
CONVERSIONS = {"AF_INET", "AF_INET6", "AF_UNSPEC", "inet_ntop", "inet_pton"}
"""Names of the module `socket` that do not open sockets."""


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, including imports in functions and under conditions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (module_of(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                # `from kproxy.config import Config` imports the package, `from kproxy.nftables import names` a module.
                name = module_of(f"{node.module}.{alias.name}")
                yield name if name in MODULES else module_of(node.module)


def module_of(name: str) -> str:
    """Return the module that contains a package's code, the name itself for other modules."""
    return f"{name}.__init__" if f"{name}.__init__" in MODULES else name


def subpackage(module: str) -> str:
    """Return the package directly below kproxy that a module belongs to, "" for other modules."""
    words = module.split(".")
    return words[1] if words[0] == "kproxy" and len(words) > 1 else ""


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), -1)


def pure_modules() -> list[str]:
    patterns = [f"kproxy.{pattern}" for pattern in PURE]
    return [
        module
        for module in MODULES
        if any(module == item or (item.endswith("*") and module.startswith(item[:-1])) for item in patterns)
    ]


SUBPACKAGES = {module: subpackage(module) for module in MODULES if subpackage(module) not in {"", "__init__"}}
KNOWN = {name for names in LAYERS for name in names}


def test_every_package_has_a_layer() -> None:
    assert set(SUBPACKAGES.values()) - KNOWN == set()


@pytest.mark.parametrize("module", SUBPACKAGES)
def test_packages_import_only_lower_layers(module: str) -> None:
    own = SUBPACKAGES[module]
    used = {imported: subpackage(imported) for imported in imports(MODULES[module]) if subpackage(imported) in KNOWN}
    wrong = sorted(imported for imported, other in used.items() if other != own and layer(other) <= layer(own))
    assert wrong == []


@pytest.mark.parametrize("module", [module for module, own in SUBPACKAGES.items() if own in ONLY_MODEL])
def test_packages_that_may_import_only_the_model(module: str) -> None:
    used = {subpackage(imported) for imported in imports(MODULES[module])} & KNOWN
    assert used <= {SUBPACKAGES[module], "model"}


def impure_imports(path: Path) -> set[str]:
    """Return the modules in `IMPURE` that a file imports, not counting imports of `CONVERSIONS`."""
    impure = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            impure |= {alias.name.split(".")[0] for alias in node.names} & IMPURE
        elif isinstance(node, ast.ImportFrom) and node.module:
            name = node.module.split(".")[0]
            if name in IMPURE and not (name == "socket" and {alias.name for alias in node.names} <= CONVERSIONS):
                impure.add(name)
    return impure


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_import_no_module_with_side_effects(module: str) -> None:
    assert impure_imports(MODULES[module]) == set()


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_import_only_pure_modules(module: str) -> None:
    used = {imported for imported in imports(MODULES[module]) if imported in MODULES}
    assert used - set(pure_modules()) == set()


def test_every_listed_pure_module_exists() -> None:
    pure = pure_modules()
    assert len(pure) > len(PURE)
    assert all(f"kproxy.{pattern}" in pure for pattern in PURE if not pattern.endswith("*"))


def test_there_are_no_import_cycles() -> None:
    graph = {
        module: {imported for imported in imports(path) if imported in MODULES} for module, path in MODULES.items()
    }
    while leaves := {module for module, used in graph.items() if not used & graph.keys()}:
        graph = {module: used for module, used in graph.items() if module not in leaves}
    assert sorted(graph) == [], "these modules are part of an import cycle, or import one that is"


def test_modules_documented_as_pure_are_those_of_the_list() -> None:
    """The docstring of a package counts for all of its modules."""
    docstrings = {module: ast.get_docstring(ast.parse(path.read_text())) or "" for module, path in MODULES.items()}
    documented = {module for module, text in docstrings.items() if re.search(r"\bPure\b", text)}
    packages = {module.removesuffix(".__init__") for module in documented if module.endswith(".__init__")}
    documented |= {module for module in MODULES if module.rpartition(".")[0] in packages}
    assert documented == set(pure_modules())


def test_class_names_are_unique() -> None:
    classes = [
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name in set(classes) if classes.count(name) > 1) == []
