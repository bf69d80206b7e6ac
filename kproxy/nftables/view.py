"""What the kernel holds in a table, whoever put it there."""

from __future__ import annotations

from msgspec import Struct, field

from kproxy.nftables.elements import Element
from kproxy.nftables.objects import Hook
from kproxy.nftables.shape import Shape


class View(Struct):
    """A table: its sets by name, its chains with the hook of each that has one, and the elements of some sets.

    The elements are those of the sets that are always there, as far as they have the right shape. `flags` are those of
    the table: it sleeps, or belongs to a process.
    """

    sets: dict[str, Shape] = field(default_factory=dict)
    chains: dict[str, Hook | None] = field(default_factory=dict)
    elements: dict[str, dict[bytes, Element]] = field(default_factory=dict)
    flags: int = 0
