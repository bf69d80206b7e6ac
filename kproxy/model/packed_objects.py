"""Objects that are stored as MessagePack, in a third of the memory, and decoded on each access. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


def pack_all(objects: Sequence[_S]) -> Iterable[bytes]:
    """Return the packed form of each object. A `PackedSequence` already has it."""
    return objects.packed if isinstance(objects, PackedSequence) else map(pack, objects)


@cache
def _decoder(kind: type[Struct]) -> object:
    return Decoder(kind)


class PackedSequence(Sequence[_S], Generic[_S]):
    """A sequence of packed objects of one type, each decoded on access.

    It compares equal to any sequence that contains equal objects in the same order.
    """

    def __init__(self, kind: type[_S], packed: Sequence[bytes]) -> None:
        self._kind = kind
        self.packed = packed

    @overload
    def __getitem__(self, index: int) -> _S: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_S]: ...

    def __getitem__(self, index: int | slice) -> _S | Sequence[_S]:
        if isinstance(index, slice):
            return PackedSequence(self._kind, self.packed[index])
        return unpack(self._kind, self.packed[index])

    def __iter__(self) -> Iterator[_S]:
        return (unpack(self._kind, packed) for packed in self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # unhashable, like the lists that it can be equal to

    def __repr__(self) -> str:
        return repr(list(self))
