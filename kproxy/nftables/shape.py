"""The sizes and types of sets, as the kernel and nft number them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from kproxy.model.types import Family
from kproxy.nftables.objects import Field, Set, Value

_MAP, _TIMEOUT, _EVAL = 8, 0x10, 0x20
_IPV4_ADDRESS, _IPV6_ADDRESS = 7, 8
_TYPES = {Field.PROTOCOL: 12, Field.PORT: 13, Field.NUMBER: 4}
_TYPE_BITS = 6
_AFFINITY_SET_SIZE = 65535
"""How many clients an endpoint can remember: what the kernel takes for a set that rules add to, if it is told no size.

kube-proxy tells it the same size, and then the kernel sets aside room for all of them at once, 2 MB for each endpoint.
"""

_VERDICT_TYPE, _VERDICT_SIZE = 0xFFFFFF00, 16


class Shape(Struct, frozen=True):
    """What decides whether a set can be used as it is.

    `timeout` is in milliseconds, `size` how many elements it may have (0: as many as there is memory for).
    """

    flags: int
    key_type: int
    key_size: int
    data_type: int = 0
    data_size: int = 0
    timeout: int = 0
    size: int = 0

    @property
    def has_verdicts(self) -> bool:
        """Whether elements may lead to chains, which cannot be deleted before the elements are."""
        return self.data_type == _VERDICT_TYPE


def shape_of(found: Set, family: Family) -> Shape:
    """Return the shape that a set has in the table of a family."""
    flags = 0 if found.value is Value.NOTHING else _MAP
    if found.timeout:
        flags |= _TIMEOUT | _EVAL
    data_type = data_size = 0
    if found.value is Value.VERDICT:
        data_type, data_size = _VERDICT_TYPE, _VERDICT_SIZE
    elif found.value is Value.ENDPOINT:
        data_type, data_size = _concatenated((Field.DESTINATION, Field.PORT), family)
    key_type, key_size = _concatenated(found.key, family)
    size = _AFFINITY_SET_SIZE if found.timeout else 0
    return Shape(flags, key_type, key_size, data_type, data_size, found.timeout * 1000, size)


def _concatenated(fields: Iterable[Field], family: Family) -> tuple[int, int]:
    """Return type and size of fields one after the other, each padded to a register."""
    kind = size = 0
    for field in fields:
        address = _IPV6_ADDRESS if family is Family.IPV6 else _IPV4_ADDRESS
        kind = kind << _TYPE_BITS | _TYPES.get(field, address)
        size += 16 if field not in _TYPES and family is Family.IPV6 else 4
    return kind, size
