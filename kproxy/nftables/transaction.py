"""One atomic change to the table. Pure."""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import astuple

from kproxy.nftables.elements import EndpointElements, SetElement
from kproxy.nftables.ruleset import NftChain, NftSet


class Transaction(Struct):
    """Changes to the table that the kernel accepts or rejects as a whole.

    The kernel applies the changes in the order of the fields. In this order, every reference to an object is removed
    before the object itself is deleted.

    `create_table` creates the table if it does not exist. `replace_table` deletes the table with all its contents and
    creates it again. Elements are keyed by the name of their set. `flushed_chains` are chains whose rules are all
    deleted. `added_chains` are created without rules, and then all rules of each chain in `added_rules` are appended to
    it. A changed chain is therefore in both `flushed_chains` and `added_rules`. `added_endpoints` are the endpoint
    elements of frontends that previously had no elements in the same map. `delete_table` deletes the table at the end.
    """

    create_table: bool = False
    replace_table: bool = False
    deleted_elements: dict[str, list[SetElement]] = field(default_factory=dict)
    flushed_chains: list[str] = field(default_factory=list)
    deleted_sets: list[str] = field(default_factory=list)
    deleted_chains: list[str] = field(default_factory=list)
    added_sets: list[NftSet] = field(default_factory=list)
    added_chains: list[NftChain] = field(default_factory=list)
    added_rules: list[NftChain] = field(default_factory=list)
    added_endpoints: dict[str, list[EndpointElements]] = field(default_factory=dict)
    added_elements: dict[str, list[SetElement]] = field(default_factory=dict)
    delete_table: bool = False

    def __bool__(self) -> bool:
        return any(astuple(self))

    def delete_element(self, set_name: str, element: SetElement) -> None:
        """Add the deletion of an element to the transaction."""
        self.deleted_elements.setdefault(set_name, []).append(element)

    def add_element(self, set_name: str, element: SetElement) -> None:
        """Add the creation of an element to the transaction."""
        self.added_elements.setdefault(set_name, []).append(element)

    def all_added_elements(self) -> dict[str, list[SetElement]]:
        """Return all elements of `added_endpoints` and `added_elements` as `SetElement` objects, by set name."""
        found = {name: [each for run in runs for each in run.elements()] for name, runs in self.added_endpoints.items()}
        for name, elements in self.added_elements.items():
            found.setdefault(name, []).extend(elements)
        return found

    def split_off_new_chains(self) -> Transaction | None:
        """Move the creation of new regular chains to a separate transaction, and return that transaction.

        It must be committed before this one. It also creates the new sets, because the new chains can use them. Return
        None if there are no new chains. Also return None if this transaction creates the table or replaces a set: in
        these cases, the new chains cannot be created in advance.

        For each packet, the kernel evaluates the rules of one generation, but it looks up sets in their latest state
        (Linux 6.18, `nft_do_chain`). If one transaction added both a chain and an element whose verdict is a goto to
        that chain, a packet in flight could get the new verdict but still see the chain without rules. A chain that no
        verdict refers to does no harm, so new chains are created first.
        """
        if self.create_table or {each.name for each in self.added_sets} & set(self.deleted_sets):
            return None
        new = {chain.name for chain in self.added_chains if chain.hook is None}
        if not new:
            return None
        first = Transaction(
            added_sets=self.added_sets,
            added_chains=[chain for chain in self.added_chains if chain.name in new],
            added_rules=[chain for chain in self.added_rules if chain.name in new],
        )
        self.added_sets = []
        self.added_chains = [chain for chain in self.added_chains if chain.name not in new]
        self.added_rules = [chain for chain in self.added_rules if chain.name not in new]
        return first

    def undo_new_chains(self) -> Transaction:
        """Return the transaction that deletes the chains and sets that a transaction for new chains has created."""
        new = [chain.name for chain in self.added_chains]
        return Transaction(
            flushed_chains=new, deleted_sets=[each.name for each in self.added_sets], deleted_chains=list(reversed(new))
        )
