"""Compare the nftables rules of one Service in the kernel with its plan. Changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence

from msgspec.structs import replace

from kproxy.diagnose.explain_facts import KernelDifference, RulesComparison
from kproxy.host.nf_tables_constants import NFT_TABLE_F_DORMANT
from kproxy.model.context import Context
from kproxy.model.drift import Part
from kproxy.model.plan import ServicePortPlan
from kproxy.nftables import names
from kproxy.nftables.comments import comment_of
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable
from kproxy.nftables.diff import IncompatibleTableError, NftablesDiff
from kproxy.nftables.elements import DROP, frontend_text, unpack_address
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import RenderedFrontend, RenderedService, render_service
from kproxy.nftables.repair import ChainState, TableParts, plan_repair
from kproxy.nftables.ruleset import KeyField, MapValue
from kproxy.nftables.shared_chains import SharedChain
from kproxy.nftables.table_check import CheckedTable

_INDEX_SIZE = 4
_SETTINGS_CHAINS = {"services", "masquerading", "cluster-ips-check", "nodeport-endpoints-check", "filter-input"}
"""The base chains whose rules depend on settings."""
_LOCALHOST = "localhost-"
"""The beginning of the names of chains that exist only with some settings."""


def compare_nftables(
    table: CheckedTable,
    plans: Sequence[ServicePortPlan],
    context: Context,
    *,
    lost: Collection[str] = (),
    whole: bool = True,
) -> RulesComparison | None:
    """Return what differs, and what was compared. Return None if the table does not exist.

    `lost` are the frontends that belong to other Services (`IP:port/PROTOCOL` or `NodePort number/PROTOCOL`). Without
    `whole`, the settings in the context are only assumed: chains whose rules depend on them must only exist and not be
    empty. Raises `TableError` if the table cannot be read.
    """
    flags = table.flags()
    if flags is None:
        return None
    rendered = render_service(plans, context)
    assert rendered is not None
    rendered = replace(rendered, frontends=tuple(each for each in rendered.frontends if _name(each) not in lost))
    if flags & NFT_TABLE_F_DORMANT:
        text = f"table {names.table_family(context.family)} {names.TABLE}"
        return RulesComparison("", [KernelDifference(context.family, text, "is dormant: the kernel ignores it")])
    ledger = NftablesLedger()
    diff = NftablesDiff(ledger, context, create=True)
    diff.put(plans[0].service, rendered)
    diff.next_transaction()
    desired = DesiredTable(ledger, context.family)
    parts = _read(table, desired, rendered, whole=whole)
    try:
        found = plan_repair(desired, parts).parts
    except IncompatibleTableError as error:
        return RulesComparison(
            "", [KernelDifference(context.family, f"table {names.TABLE}", f"is not kproxy's: {error}")]
        )
    result = RulesComparison("; ".join(dict.fromkeys(map(_summary, rendered.frontends))))
    for part in found:
        result.differences.append(KernelDifference(context.family, *_described(part, parts, desired)))
    result.owners = dict(_owners(parts, rendered))
    return result


def _owners(parts: TableParts, service: RenderedService) -> Iterator[tuple[str, str]]:
    """Yield the frontends whose verdicts name ports of other Services in their comments, and these ports."""
    own = {comment_of(each.service_port) for each in service.frontends}
    for name, elements in parts.elements.items():
        if BASE_SETS[name].value is MapValue.VERDICT:
            for key, element in elements.items():
                if element is not None and "/" in element.comment and element.comment not in own:
                    yield frontend_text(key), element.comment


def _name(frontend: RenderedFrontend) -> str:
    return frontend_text(frontend.key)


def _summary(frontend: RenderedFrontend) -> str:
    """Return what the verdict maps do with a frontend, such as `service-ips: service-endpoints-2`."""
    verdicts = {DROP: "drop", names.REJECT: "reject"}
    return ", ".join(f"{name}: {verdicts.get(verdict, verdict)}" for name, verdict in frontend.verdicts)


def _read(table: CheckedTable, desired: DesiredTable, service: RenderedService, *, whole: bool) -> TableParts:
    own_sets = [each.name for each in service.sets]
    layouts = table.sets({*BASE_SETS, *own_sets})
    parts = TableParts(sets={name: layouts.get(name) for name in (*BASE_SETS, *own_sets)})
    for name in BASE_SETS.keys() & layouts.keys():
        definition = BASE_SETS[name]
        parts.elements[name] = {
            key: table.element(definition, key) for key in _keys(name, desired, service, whole=whole)
        }
    wanted = sorted(desired.chain_names())
    hooks = table.chains(wanted)
    for name in wanted:
        if name not in hooks:
            if whole or not name.startswith(_LOCALHOST):
                parts.chains[name] = None
            continue
        rules = table.rules(name)
        if whole or not rules or not _depends_on_context(name):
            parts.chains[name] = ChainState(hooks[name], rules)
    return parts


def _depends_on_context(name: str) -> bool:
    """Return whether the rules of a chain depend on settings: those for external traffic set the packet mark."""
    if name in _SETTINGS_CHAINS or name.startswith(_LOCALHOST):
        return True
    chain = SharedChain.parse(name)
    return chain.policy.startswith("external") if chain is not None else name.startswith("external-")


def _keys(set_name: str, desired: DesiredTable, service: RenderedService, *, whole: bool) -> Iterator[bytes]:
    """Yield the keys of elements to compare: all that the Service needs, and verdicts that it must not have."""
    definition = BASE_SETS[set_name]
    if set_name == names.LOCALHOST_NODE_PORTS and not whole:
        return
    if definition.value is MapValue.NONE:
        if set_name != names.NODE_PORT_IPS or whole:
            yield from desired.groups(set_name)
        return
    for_addresses = KeyField.DESTINATION in definition.key
    for frontend in service.frontends:
        if for_addresses is _has_address(frontend.key):
            if definition.value is MapValue.VERDICT:
                yield frontend.key
            else:
                yield from (each.key for each in desired.elements_of_group(set_name, frontend.key))


def _has_address(key: bytes) -> bool:
    return not frontend_text(key).startswith("NodePort")


def _described(part: Part, parts: TableParts, desired: DesiredTable) -> tuple[str, str]:
    """Return the name of a part that differs, and how."""
    if part.kind == "chain":
        return f"chain {part.name}", "is missing" if parts.chains[part.name] is None else "has other rules"
    if part.kind == "set":
        kind = "map" if part.name in BASE_SETS and BASE_SETS[part.name].value is not MapValue.NONE else "set"
        return f"{kind} {part.name}", "is missing"
    existing, wanted = parts.elements[part.name].get(part.key), desired.element(part.name, part.key)
    problem = "is missing" if existing is None else "must not exist" if wanted is None else "has another value"
    return f"element {_key_text(part.name, part.key)} of {part.name}", problem


def _key_text(set_name: str, key: bytes) -> str:
    definition = BASE_SETS[set_name]
    if set_name == names.HAIRPINS:
        return f"of endpoint {unpack_address(key[: 16 if len(key) > 24 else 4])}"
    if definition.value is MapValue.NONE:
        return unpack_address(key)
    if definition.value is MapValue.VERDICT:
        return frontend_text(key)
    index = int.from_bytes(key[-_INDEX_SIZE:], sys.byteorder)
    return f"{frontend_text(key[:-_INDEX_SIZE])} #{index}"
