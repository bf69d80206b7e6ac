"""What the kernel holds in a table, whoever put it there. Pure."""

from __future__ import annotations

from msgspec import Struct, field

from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import SetElement, SetLayout, numbered
from kproxy.nftables.ruleset import MapValue, NftHook


class TableSnapshot(Struct):
    """A table: its sets by name, its chains with the hook of each that has one, and the elements of some sets.

    The elements are those of the sets that are always there, as far as they have the right shape. `flags` are those of
    the table: it sleeps, or belongs to a process.
    """

    sets: dict[str, SetLayout] = field(default_factory=dict)
    chains: dict[str, NftHook | None] = field(default_factory=dict)
    elements: dict[str, dict[bytes, SetElement]] = field(default_factory=dict)
    flags: int = 0

    def take_frontend(self, key: bytes, verdicts: dict[str, SetElement], pools: dict[str, bytes]) -> None:
        """Move what is under a frontend's key to the verdicts and pools given, which are by the name of their map."""
        for each in SETS:
            elements = self.elements.get(each.name, {})
            if each.value is MapValue.VERDICT and (element := elements.pop(key, None)) is not None:
                verdicts[each.name] = element
            elif each.value is MapValue.ENDPOINT and (pool := _take_pool(elements, key)):
                pools[each.name] = pool


def _take_pool(elements: dict[bytes, SetElement], key: bytes) -> bytes:
    """Take out of a map of endpoints those that are numbered under a key without a gap; return their values."""
    values: list[bytes] = []
    while (element := elements.pop(numbered(key, len(values)), None)) is not None:
        assert isinstance(element.value, bytes)
        values.append(element.value)
    return b"".join(values)
