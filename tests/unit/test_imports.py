"""Who may import whom: imports point down, and what is pure stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kproxy

ROOT = Path(kproxy.__file__).parent
MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

LAYERS = (
    {"__main__"},
    {"cli"},
    {"app"},
    {"sync", "config", "kube"},
    {"documents", "iptables", "nftables", "ipvs", "simulate", "serve"},
    {"host"},
    {"model"},
)
"""A part imports itself and parts further down, never its neighbours: so backends know nothing of each other, and
the simulator, which judges their rules, knows nothing of them."""

ONLY_MODEL = {"host", "serve", "simulate"}

PURE = (
    "model.*",
    *(f"iptables.{name}" for name in ("names", "render", "base_rules", "save_restore", "ledger", "diff", "dispatch")),
    *(f"iptables.{name}" for name in ("conflicts", "patch", "cleanup")),
    *(f"nftables.{name}" for name in ("names", "ruleset", "elements", "base_table", "shared_chains", "render")),
    *(
        f"nftables.{name}"
        for name in ("ledger", "transaction", "diff", "snapshot", "nft_syntax", "expressions", "encode")
    ),
    *(f"kube.codec.{name}" for name in ("schema", "object_error", "conversion", "json_codec", "protobuf")),
    *("kube.codec.watch_events", "kube.codec.streams"),
    *("kube.listwatch.list_watch", "kube.events.correlator", "kube.client.http_proxy"),
    *("sync.schedule", "sync.family", "sync.conditions", "sync.summary", "app.contexts"),
    *(
        "config.types",
        "config.conntrack_sysctls",
        "serve.http",
        "serve.zpages",
        "host.netlink_message",
        "documents.document",
    ),
)
IMPURE = {"os", "socket", "subprocess", "threading", "time", "pathlib", "random", "logging"}
CONVERSIONS = {"AF_INET", "AF_INET6", "AF_UNSPEC", "inet_ntop", "inet_pton"}
"""Names of the module `socket` that open no socket."""


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, also within functions and under conditions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            is_package = (ROOT.parent / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if is_package else (node.module,)


def part(module: str) -> str:
    """The part of kproxy that a module belongs to: the second word of its name, "" for none."""
    words = module.split(".")
    return words[1] if words[0] == "kproxy" and len(words) > 1 else ""


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), -1)


def pure_modules() -> list[str]:
    patterns = [f"kproxy.{pattern}" for pattern in PURE]
    return [
        module
        for module in MODULES
        if any(module == each or (each.endswith("*") and module.startswith(each[:-1])) for each in patterns)
    ]


PARTS = {module: part(module) for module in MODULES if part(module) not in {"", "__init__"}}
KNOWN = {each for names in LAYERS for each in names}


def test_every_part_has_its_layer() -> None:
    assert set(PARTS.values()) - KNOWN == set()


@pytest.mark.parametrize("module", PARTS)
def test_imports_point_down(module: str) -> None:
    own = PARTS[module]
    used = {each: part(each) for each in imports(MODULES[module]) if part(each) in KNOWN}
    wrong = sorted(each for each, other in used.items() if other != own and layer(other) <= layer(own))
    assert wrong == []


@pytest.mark.parametrize("module", [module for module, own in PARTS.items() if own in ONLY_MODEL])
def test_what_knows_only_the_model(module: str) -> None:
    used = {part(each) for each in imports(MODULES[module])} & KNOWN
    assert used <= {PARTS[module], "model"}


def impure_imports(path: Path) -> set[str]:
    """The modules among `IMPURE` that a file imports, except for conversions only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & IMPURE
        elif isinstance(node, ast.ImportFrom) and node.module:
            name = node.module.split(".")[0]
            if name in IMPURE and not (name == "socket" and {alias.name for alias in node.names} <= CONVERSIONS):
                found.add(name)
    return found


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_import_nothing_that_acts(module: str) -> None:
    assert impure_imports(MODULES[module]) == set()


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_import_only_pure_ones(module: str) -> None:
    used = {each for each in imports(MODULES[module]) if each in MODULES and "__init__" not in each}
    assert used - set(pure_modules()) == set()


def test_the_list_of_pure_modules_is_right() -> None:
    found = pure_modules()
    assert len(found) > len(PURE)
    assert all(f"kproxy.{pattern}" in found for pattern in PURE if not pattern.endswith("*"))


def test_no_modules_import_each_other() -> None:
    graph = {module: {each for each in imports(path) if each in MODULES} for module, path in MODULES.items()}
    while leaves := {module for module, used in graph.items() if not used & graph.keys()}:
        graph = {module: used for module, used in graph.items() if module not in leaves}
    assert sorted(graph) == [], "these are in a circle, or import somebody who is"


def test_class_names_are_unique() -> None:
    classes = [
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name in set(classes) if classes.count(name) > 1) == []
