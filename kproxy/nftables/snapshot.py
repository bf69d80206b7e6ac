"""The kernel's current state of one table. Pure."""

from __future__ import annotations

from msgspec import Struct, field

from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import SetElement, SetLayout, endpoint_key
from kproxy.nftables.ruleset import MapValue, NftHook


class TableSnapshot(Struct):
    """The sets of a table by name, its chains with their hooks (None for a regular chain), and its elements by set.

    `elements` has only the sets of `base_table.SETS` that have the expected layout. `flags` are the table's flags (enum
    nft_table_flags), which mark a table that is dormant or that a process owns.
    """

    sets: dict[str, SetLayout] = field(default_factory=dict)
    chains: dict[str, NftHook | None] = field(default_factory=dict)
    elements: dict[str, dict[bytes, SetElement]] = field(default_factory=dict)
    flags: int = 0

    def pop_frontend(self, key: bytes, verdicts: dict[str, SetElement], endpoints: dict[str, bytes]) -> None:
        """Move a frontend's elements from the snapshot to `verdicts` and `endpoints`, by the name of their map."""
        for each in SETS:
            elements = self.elements.get(each.name, {})
            if each.value is MapValue.VERDICT and (element := elements.pop(key, None)) is not None:
                verdicts[each.name] = element
            elif each.value is MapValue.ENDPOINT and (values := _pop_endpoints(elements, key)):
                endpoints[each.name] = values


def _pop_endpoints(elements: dict[bytes, SetElement], key: bytes) -> bytes:
    """Remove a frontend's endpoints from a map's elements, up to the first missing index; return their values."""
    values: list[bytes] = []
    while (element := elements.pop(endpoint_key(key, len(values)), None)) is not None:
        assert isinstance(element.value, bytes)
        values.append(element.value)
    return b"".join(values)
