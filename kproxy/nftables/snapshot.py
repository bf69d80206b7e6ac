"""The kernel's current state of one table. Pure."""

from __future__ import annotations

from msgspec import Struct, field

from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import SetElement, SetLayout, endpoint_key
from kproxy.nftables.ruleset import MapValue, NftHook


class TableSnapshot(Struct):
    """The state of a table as it was read from the kernel.

    `sets` contains the layout of each set and map, by name. `chains` contains the hook of each chain, by name; the hook
    of a regular chain is None. `elements` contains the elements by the name of their set and by their key, but only for
    sets of `base_table.SETS` that have the expected layout. `flags` are the table's flags (enum nft_table_flags). They
    mark a table that is dormant or that is owned by a process.
    """

    sets: dict[str, SetLayout] = field(default_factory=dict)
    chains: dict[str, NftHook | None] = field(default_factory=dict)
    elements: dict[str, dict[bytes, SetElement]] = field(default_factory=dict)
    flags: int = 0

    def pop_frontend(self, key: bytes, verdicts: dict[str, SetElement], endpoints: dict[str, bytes]) -> None:
        """Move a frontend's elements from the snapshot to `verdicts` and `endpoints`.

        Both are keyed by map name. `endpoints` receives the concatenated values of the endpoints, up to the first
        missing index.
        """
        for each in SETS:
            elements = self.elements.get(each.name, {})
            if each.value is MapValue.VERDICT and (element := elements.pop(key, None)) is not None:
                verdicts[each.name] = element
            elif each.value is MapValue.ENDPOINT and (values := _pop_endpoints(elements, key)):
                endpoints[each.name] = values


def _pop_endpoints(elements: dict[bytes, SetElement], key: bytes) -> bytes:
    """Remove a frontend's endpoints, up to the first missing index, from a map's elements. Return their values."""
    values: list[bytes] = []
    while (element := elements.pop(endpoint_key(key, len(values)), None)) is not None:
        assert isinstance(element.value, bytes)
        values.append(element.value)
    return b"".join(values)
