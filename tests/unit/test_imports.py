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
    {"daemon", "once"},
    {"families", "first_sync"},
    {"leftovers"},
    {"preparation", "ipvs_leftovers"},
    {"contexts", "node"},
    {"sync", "config"},
    {"iptables", "nftables", "kube", "simulate", "serve"},
    {"host"},
    {"model"},
)
"""A part imports itself and parts further down, never its neighbours: so backends know nothing of each other, and
the simulator, which judges their rules, knows nothing of them."""

ONLY_MODEL = {"host", "serve", "simulate"}

PURE = (
    "model.*",
    *(f"iptables.{name}" for name in ("names", "render", "base", "text", "ledger", "diff", "dispatch", "claims")),
    *(f"nftables.{name}" for name in ("names", "objects", "draws", "shape", "view", "base", "shared", "affinity")),
    *(f"nftables.{name}" for name in ("render", "ledger", "transaction", "diff", "wording", "text", "userdata")),
    *(
        f"kube.{name}"
        for name in ("watch", "steps", "resources", "answers", "changes", "reduction", "remarks", "proxy_rule")
    ),
    *(f"kube.{name}" for name in ("streams", "framing", "protobuf", "protobuf_fields")),
    *("sync.schedule", "sync.family", "sync.conditions", "sync.summary", "contexts"),
    *("config.fields", "config.flag_values", "serve.zpages"),
)
IMPURE = {"os", "socket", "subprocess", "threading", "time", "pathlib", "random", "logging"}


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


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_import_nothing_that_acts(module: str) -> None:
    assert {each.split(".")[0] for each in imports(MODULES[module])} & IMPURE == set()


def test_the_list_of_pure_modules_is_right() -> None:
    found = pure_modules()
    assert len(found) > len(PURE)
    assert all(f"kproxy.{pattern}" in found for pattern in PURE if not pattern.endswith("*"))
