"""What one family's table holds, as far as kproxy has put it there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kproxy.model.context import Context
from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables.elements import DROP, frontend_text
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import Go, NftChain, NftSet


class NftablesLedger:
    """The state that the kernel has accepted, kept as small as planning the next step allows.

    Elements are not kept one by one: they follow from the frontends. `frontends` has, for each key, those who claim
    it, the one first who has it; `contested` are the keys that several claim. `members` counts who needs an element of
    the sets `cluster-ips` and `hairpin-connections`, `verdicts` how many elements go to a chain. `chains` are all
    chains but those of single Services, which are in `services` with their sets.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self.services: dict[ServiceKey, RenderedService] = {}
        self.frontends: dict[bytes, RenderedFrontend | tuple[RenderedFrontend, ...]] = {}
        self.contested: dict[bytes, None] = {}
        self.members: dict[str, Counter[bytes]] = {names.CLUSTER_IPS: Counter(), names.HAIRPINS: Counter()}
        self.verdicts: Counter[str] = Counter()
        self.node_port_ips: tuple[bytes, ...] = ()
        self.chains: dict[str, NftChain] = {}

    def holder(self, key: bytes) -> RenderedFrontend | None:
        """Return the frontend that has a key, None if nobody claims it."""
        found = self.frontends.get(key)
        return found[0] if isinstance(found, tuple) else found

    def claim(self, frontend: RenderedFrontend) -> None:
        """Let a frontend have its key, unless somebody else has a better claim to it."""
        found = self.frontends.get(frontend.key)
        if found is None:
            self.frontends[frontend.key] = frontend
            return
        claims = found if isinstance(found, tuple) else (found,)
        self.frontends[frontend.key] = tuple(sorted((*claims, frontend), key=_claim))
        self.contested[frontend.key] = None

    def give_up(self, frontend: RenderedFrontend) -> None:
        """Take a frontend's claim back."""
        found = self.frontends[frontend.key]
        claims = list(found) if isinstance(found, tuple) else [found]
        claims.remove(frontend)
        if len(claims) < 2:
            self.contested.pop(frontend.key, None)
        if not claims:
            del self.frontends[frontend.key]
        else:
            self.frontends[frontend.key] = tuple(claims) if len(claims) > 1 else claims[0]

    def conflicts(self) -> tuple[FrontendConflict, ...]:
        """Return which service ports get no traffic at a frontend because another holds it, in a stable order."""
        return tuple(sorted(self._conflicts())) if self.contested else ()

    def _conflicts(self) -> Iterator[FrontendConflict]:
        for key in self.contested:
            claims = self.frontends[key]
            assert isinstance(claims, tuple)
            holder = claims[0].owner
            # Two ports of one Service: the API server accepts no such object.
            others = (each.owner for each in claims[1:] if _service_of(each.owner) != _service_of(holder))
            for owner in dict.fromkeys(others):
                yield FrontendConflict(frontend_text(key), holder, owner)

    def own_chains(self) -> list[NftChain]:
        """Return the chains that belong to single Services."""
        return [chain for service in self.services.values() for chain in service.chains]

    def own_sets(self) -> list[NftSet]:
        """Return the sets that belong to single Services."""
        return [each for service in self.services.values() for each in service.sets]

    def uses(self) -> Counter[str]:
        """Return how often each chain is used, counted as the kernel does: its rules, and what leads to it."""
        found = Counter({name: count for name, count in self.verdicts.items() if name != DROP})
        for chain in (*self.chains.values(), *self.own_chains()):
            found[chain.name] += len(chain.rules)
            for rule in chain.rules:
                last = rule.statements[-1]
                if isinstance(last, Go):
                    found[last.chain] += 1
        return found


def _service_of(owner: str) -> ServiceKey:
    return owner.partition(":")[0]


def _claim(frontend: RenderedFrontend) -> tuple[int, str]:
    """Return by what claims are ordered (`kproxy.model.frontend_conflicts`)."""
    return frontend.rank, frontend.owner
