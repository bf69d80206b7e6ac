"""One step from a state of the table to the next, which the kernel takes whole or not at all."""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import astuple

from kproxy.nftables.elements import EndpointElements, SetElement
from kproxy.nftables.ruleset import NftChain, NftSet


class Transaction(Struct):
    """What is done to the table, in the order of the fields, so that nothing is deleted while something refers to it.

    With `create`, there is a table afterwards; with `replace`, whatever was in it is gone first. `flushed` are chains
    that lose all their rules, `rules` those that get all their rules: a chain that changes is in both. The elements
    are by the name of their set; `pools` are those of frontends that had none, many at once. With `drop`, there is no
    table in the end.
    """

    create: bool = False
    replace: bool = False
    removed: dict[str, list[SetElement]] = field(default_factory=dict)
    flushed: list[str] = field(default_factory=list)
    deleted_sets: list[str] = field(default_factory=list)
    deleted_chains: list[str] = field(default_factory=list)
    sets: list[NftSet] = field(default_factory=list)
    chains: list[NftChain] = field(default_factory=list)
    rules: list[NftChain] = field(default_factory=list)
    pools: dict[str, list[EndpointElements]] = field(default_factory=dict)
    added: dict[str, list[SetElement]] = field(default_factory=dict)
    drop: bool = False

    def __bool__(self) -> bool:
        return any(astuple(self))

    def remove(self, name: str, element: SetElement) -> None:
        """Remove an element from a set."""
        self.removed.setdefault(name, []).append(element)

    def add(self, name: str, element: SetElement) -> None:
        """Add an element to a set."""
        self.added.setdefault(name, []).append(element)

    def additions(self) -> dict[str, list[SetElement]]:
        """Return all elements that are added, those of pools one by one."""
        found = {name: [element for pool in pools for element in pool.elements()] for name, pools in self.pools.items()}
        for name, elements in self.added.items():
            found.setdefault(name, []).extend(elements)
        return found

    def split_off_new_chains(self) -> Transaction | None:
        """Take out what makes new chains, to be made before all else; None if there are none or it cannot be.

        A packet sees one generation of rules, but each set as it is when it is looked up (Linux 6.18, `nft_do_chain`).
        One that is under way when chain and verdict come at once may get the verdict of after, for a chain that was
        still empty before. Nobody reaches a chain that no verdict names, so it does no harm to be early.
        """
        if self.create or {each.name for each in self.sets} & set(self.deleted_sets):
            return None
        new = {chain.name for chain in self.chains if chain.hook is None}
        if not new:
            return None
        first = Transaction(
            sets=self.sets,
            chains=[chain for chain in self.chains if chain.name in new],
            rules=[chain for chain in self.rules if chain.name in new],
        )
        self.sets = []
        self.chains = [chain for chain in self.chains if chain.name not in new]
        self.rules = [chain for chain in self.rules if chain.name not in new]
        return first
