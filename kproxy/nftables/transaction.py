"""One atomic change of the table. Pure."""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import astuple

from kproxy.nftables.elements import EndpointElements, SetElement
from kproxy.nftables.ruleset import NftChain, NftSet


class Transaction(Struct):
    """Changes of the table that the kernel accepts or rejects as a whole.

    The kernel applies them in the order of the fields, which removes every reference to an object before the object.
    `create_table` creates the table if it does not exist, `replace_table` deletes it with all its contents and creates
    it again. `added_chains` are created without rules; `added_rules` are the chains to which all their rules are
    appended, so a changed chain is in both `flushed_chains` and `added_rules`. Elements are listed by the name of their
    set; `added_endpoints` are those of frontends that had no endpoints before. `delete_table` deletes the table last.
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
        """Delete an element of a set."""
        self.deleted_elements.setdefault(set_name, []).append(element)

    def add_element(self, set_name: str, element: SetElement) -> None:
        """Add an element to a set."""
        self.added_elements.setdefault(set_name, []).append(element)

    def all_added_elements(self) -> dict[str, list[SetElement]]:
        """Return the elements of `added_endpoints` and `added_elements`, one by one."""
        found = {name: [each for run in runs for each in run.elements()] for name, runs in self.added_endpoints.items()}
        for name, elements in self.added_elements.items():
            found.setdefault(name, []).extend(elements)
        return found

    def split_off_new_chains(self) -> Transaction | None:
        """Move the creation of new chains to a transaction of its own, which must be committed first, and return it.

        Return None if there are no new chains, or if they cannot be created first.

        A packet sees the rules of one generation, but looks up each set in its latest state (Linux 6.18,
        `nft_do_chain`). If one transaction added both a chain and the verdict that goes to it, a packet in flight could
        get the new verdict while it still sees the chain without rules. Chains that no verdict refers to do no harm, so
        they are created earlier.
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
