"""Objects kept as MessagePack: a third of the size, for those that are needed now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Generic, TypeVar, cast, overload

from msgspec import Struct
from msgspec.msgpack import Decoder, Encoder

_S = TypeVar("_S", bound=Struct)
_ENCODER = Encoder()


def pack(found: Struct) -> bytes:
    """Return an object packed. Equal objects are equal when packed."""
    return _ENCODER.encode(found)


def unpack(kind: type[_S], packed: bytes) -> _S:
    """Return an object of a kind that `pack` packed."""
    return cast("Decoder[_S]", _decoder(kind)).decode(packed)


@cache
def _decoder(kind: type[Struct]) -> object:
    return Decoder(kind)


class PackedSequence(Sequence[_S], Generic[_S]):
    """Objects of one kind, unpacked one by one as they are looked at. Equal to any sequence of equal objects."""

    def __init__(self, kind: type[_S], packed: Sequence[bytes]) -> None:
        self._kind = kind
        self._packed = packed

    @overload
    def __getitem__(self, place: int) -> _S: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[_S]: ...

    def __getitem__(self, place: int | slice) -> _S | Sequence[_S]:
        if isinstance(place, slice):
            return PackedSequence(self._kind, self._packed[place])
        return unpack(self._kind, self._packed[place])

    def __iter__(self) -> Iterator[_S]:
        return (unpack(self._kind, each) for each in self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for any sequence that may change

    def __repr__(self) -> str:
        return repr(list(self))
