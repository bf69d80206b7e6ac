"""Drift: which parts of kproxy's rules other processes touched, and which of them were restored. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct, field

from kproxy.model.types import Family

MAX_TOUCHED_ELEMENTS = 1_000
"""If more elements of a set are touched, the whole set counts as touched."""

PartKind: TypeAlias = Literal["table", "chain", "set", "element"]
PART_KINDS: tuple[PartKind, ...] = ("table", "chain", "set", "element")


class Part(Struct, frozen=True, order=True):
    """A part of the rules.

    `name` is the name of the chain or set; for an element, it is the name of its set. It is "" if the part is a table
    as a whole. `key` is the key of an element in the kernel's encoding. A chain that belongs to other tools stands for
    kproxy's rules in it.
    """

    table: str
    kind: PartKind
    name: str = ""
    key: bytes = b""

    @property
    def text(self) -> str:
        """The name of the part for a message: `chain KUBE-SERVICES of table nat`."""
        if self.kind == "table":
            return f"table {self.table}"
        kind = "element of set" if self.kind == "element" else self.kind
        return f"{kind} {self.name} of table {self.table}"


class CommitAuthor(Struct, frozen=True):
    """Who made an nf_tables commit: the port ID of the netlink socket, and the PID and the name of the process.

    The port ID is usually the PID in the PID namespace of the process. `process` is the PID in the initial PID
    namespace, or 0 if it is unknown.
    """

    port: int
    process: int = 0
    name: str = ""


class Touched(Struct):
    """The parts of one table that other processes have created, changed or deleted. They may be intact again.

    `everything` means that all parts must be checked, because the table itself was touched, or because it is unknown
    which parts were. `chains` contains chains whose rules, hook or policy were touched, and chains that were created or
    deleted. `sets` contains the sets and maps that were touched as a whole. `elements` contains keys of elements by the
    name of their set. `by` contains the names of the processes, if they are known.
    """

    everything: bool = False
    chains: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)
    elements: dict[str, set[bytes]] = field(default_factory=dict)
    by: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.everything or self.chains or self.sets or self.elements)

    def add_element(self, set_name: str, key: bytes) -> None:
        """Add an element, or its whole set if too many of its elements are touched."""
        if set_name in self.sets:
            return
        keys = self.elements.setdefault(set_name, set())
        keys.add(key)
        if len(keys) > MAX_TOUCHED_ELEMENTS:
            self.add_set(set_name)

    def add_set(self, set_name: str) -> None:
        """Add a whole set."""
        self.elements.pop(set_name, None)
        self.sets.add(set_name)

    def add_part(self, part: Part) -> None:
        """Add one part."""
        if part.kind == "table":
            self.everything = True
        elif part.kind == "chain":
            self.chains.add(part.name)
        elif part.kind == "set":
            self.add_set(part.name)
        else:
            self.add_element(part.name, part.key)

    def parts(self, table: str) -> Iterator[Part]:
        """Iterate over the parts. If everything was touched, the only part is the table."""
        if self.everything:
            yield Part(table, "table")
            return
        yield from (Part(table, "chain", name) for name in self.chains)
        yield from (Part(table, "set", name) for name in self.sets)
        yield from (Part(table, "element", name, key) for name, keys in self.elements.items() for key in keys)


class RulesChanged(Struct, frozen=True):
    """Another process has committed changes to tables in which kproxy has rules.

    `tables` contains what was touched, by the family and the name of the table. If it is unknown what was touched,
    because notifications were lost, all tables are present and `Touched.everything` is true.
    """

    tables: Mapping[tuple[Family, str], Touched]


class RepairResult(Struct, frozen=True):
    """The outcome of comparing parts of the rules in the kernel with the desired state.

    The `repaired` parts differed and have been restored. `findings` are differences that kproxy cannot or must not
    repair, such as a rule of another tool that drops packets before they reach kproxy's rules; each is one line, which
    names its part as `Part.text` does. If `needs_full_sync` is true, only a full sync can restore the rules. If
    `skipped` is true, nothing was compared, because a full sync was necessary before.
    """

    repaired: tuple[Part, ...] = ()
    findings: tuple[str, ...] = ()
    needs_full_sync: bool = False
    skipped: bool = False
