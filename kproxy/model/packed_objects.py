"""Objects that are stored as MessagePack, in a third of the memory, and decoded on each access. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Generic, TypeVar, cast, overload

from msgspec import Struct
from msgspec.msgpack import Decoder, Encoder

_S = TypeVar("_S", bound=Struct)
_ENCODER = Encoder()


def pack(value: Struct) -> bytes:
    """Encode an object. Equal objects have equal encodings."""
    return _ENCODER.encode(value)


def unpack(kind: type[_S], packed: bytes) -> _S:
    """Decode an object of the given type that `pack` encoded."""
    return cast("Decoder[_S]", _decoder(kind)).decode(packed)


def object_key(namespace: str, name: str) -> str:
    """Return the key of an object among those of its kind. The namespace of Nodes and ServiceCIDRs is ""."""
    return f"{namespace}/{name}"


def split_object_key(key: str) -> tuple[str, str]:
    """Return the namespace and name in an `object_key`."""
    namespace, _, name = key.partition("/")
    return namespace, name


@cache
def _decoder(kind: type[Struct]) -> object:
    return Decoder(kind)


class PackedSequence(Sequence[_S], Generic[_S]):
    """A sequence of packed objects of one type, each decoded on access.

    It compares equal to any sequence that contains equal objects in the same order.
    """

    def __init__(self, kind: type[_S], by_key: Mapping[str, bytes]) -> None:
        """`by_key` contains the packed objects by `object_key`."""
        self._kind = kind
        self.by_key = by_key

    @overload
    def __getitem__(self, index: int) -> _S: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_S]: ...

    def __getitem__(self, index: int | slice) -> _S | Sequence[_S]:
        packed = list(self.by_key.items())[index]
        if isinstance(packed, list):
            return PackedSequence(self._kind, dict(packed))
        return unpack(self._kind, packed[1])

    def __iter__(self) -> Iterator[_S]:
        return (unpack(self._kind, packed) for packed in self.by_key.values())

    def __len__(self) -> int:
        return len(self.by_key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # unhashable, like the lists that it can be equal to

    def __repr__(self) -> str:
        return repr(list(self))
