"""The ledger of one family's table: what the kernel has accepted so far. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kproxy.model.context import Context
from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables.elements import DROP, frontend_text
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import Goto, Jump, NftChain, NftSet


class NftablesLedger:
    """The state that the kernel has accepted, reduced to what the next diff needs.

    `frontends` contains the claims to each frontend, by the frontend's key. If there are several claims, the first one
    owns the frontend, and the key is also in `contested`. Verdict and endpoint elements are not stored, because they
    can be computed from the frontends. `element_references` counts the Services or endpoints that need each element of
    the sets `cluster-ips` and `hairpin-connections`. `verdict_counts` counts the elements with each verdict. `services`
    contains all Services, including their per-Service chains and sets. `chains` contains all other chains.
    `node_port_ips` are the packed addresses in the set `nodeport-ips`. `context` is None in a new ledger.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self.services: dict[ServiceKey, RenderedService] = {}
        self.frontends: dict[bytes, RenderedFrontend | tuple[RenderedFrontend, ...]] = {}
        self.contested: dict[bytes, None] = {}
        self.element_references: dict[str, Counter[bytes]] = {names.CLUSTER_IPS: Counter(), names.HAIRPINS: Counter()}
        self.verdict_counts: Counter[str] = Counter()
        self.node_port_ips: tuple[bytes, ...] = ()
        self.chains: dict[str, NftChain] = {}

    def owner(self, key: bytes) -> RenderedFrontend | None:
        """Return the claim that owns the frontend with this key, or None if no Service claims the frontend."""
        found = self.frontends.get(key)
        return found[0] if isinstance(found, tuple) else found

    def add_claim(self, frontend: RenderedFrontend) -> None:
        """Add a service port's claim to a frontend."""
        found = self.frontends.get(frontend.key)
        if found is None:
            self.frontends[frontend.key] = frontend
            return
        claims = found if isinstance(found, tuple) else (found,)
        self.frontends[frontend.key] = tuple(sorted((*claims, frontend), key=claim_order))
        self.contested[frontend.key] = None

    def remove_claim(self, frontend: RenderedFrontend) -> None:
        """Remove a service port's claim to a frontend."""
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
        """Return all conflicts, sorted: service ports that claim a frontend that another Service owns."""
        return tuple(sorted(self._conflicts())) if self.contested else ()

    def _conflicts(self) -> Iterator[FrontendConflict]:
        for key in self.contested:
            claims = self.frontends[key]
            assert isinstance(claims, tuple)
            owner = claims[0].service_port
            # Report only conflicts between Services. The API server rejects a Service whose own ports conflict.
            others = (each.service_port for each in claims[1:] if each.service != claims[0].service)
            for loser in dict.fromkeys(others):
                yield FrontendConflict(frontend_text(key), owner, loser)

    def service_chains(self) -> list[NftChain]:
        """Return the per-Service chains of all Services."""
        return [chain for service in self.services.values() for chain in service.chains]

    def service_sets(self) -> list[NftSet]:
        """Return the per-Service sets of all Services."""
        return [each for service in self.services.values() for each in service.sets]

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count that the kernel should report for each chain (NFTA_CHAIN_USE).

        A chain's use count is the number of its rules plus the number of rules and elements whose verdict is a jump or
        goto to it.
        """
        counts = Counter({name: count for name, count in self.verdict_counts.items() if name != DROP})
        for chain in (*self.chains.values(), *self.service_chains()):
            counts[chain.name] += len(chain.rules)
            for rule in chain.rules:
                last = rule.statements[-1]
                if isinstance(last, (Jump, Goto)):
                    counts[last.chain] += 1
        return counts


def claim_order(frontend: RenderedFrontend) -> tuple[int, str]:
    """Return the sort key of a claim. The claim with the lowest key owns the frontend.

    See `kproxy.model.frontend_conflicts` for the rules.
    """
    return frontend.rank, frontend.service_port
