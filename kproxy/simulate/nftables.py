"""What nftables rules do to a packet: the hooks it passes, and a walk through their chains.

A packet is not followed once but as a flock, which divides wherever a number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_parser import BaseChainHook, ListedChain, base_chains, read_dump
from kproxy.simulate.nftables_statements import ListedVerdict
from kproxy.simulate.packet import (
    FateDistribution,
    Flock,
    Packet,
    PacketState,
    Verdict,
    anywhere,
    divide,
    each,
    elsewhere,
    follow,
    here,
)


class NftablesSimulator:
    """The rules of one family, as `nft list table ip kube-proxy` or `ip6 kube-proxy` printed them.

    Raises `UnknownRuleError` if the text holds anything that is not understood.
    """

    def __init__(self, dump: str, family: Family) -> None:
        self._chains: dict[str, ListedChain] = read_dump(dump, family)
        self._family = family

    def send(self, packet: Packet) -> FateDistribution:
        """Return what may become of the packet; `ValueError` if it is of the other family.

        The hooks are those of netfilter's packet flow: destinations are translated before routing
        decides between this node and elsewhere, and only for the first packet of a connection.
        """
        return follow(packet, self._family, self._come_in, self._go_out)

    def _come_in(self, flock: Flock) -> Flock:
        flock = self._hook("prerouting", flock, anywhere)
        flock = self._hook("input", flock, here)
        flock = self._hook("forward", flock, elsewhere)
        return self._hook("postrouting", flock, elsewhere)

    def _go_out(self, flock: Flock) -> Flock:
        """Follow a packet of the node's own; to an address of the node's own, it comes in again by `lo`.

        It is then still the first of its connection for chains of type filter, while its translation is settled.
        """
        flock = self._hook("output", flock, anywhere)
        flock = self._hook("postrouting", flock, anywhere)
        looped, gone = divide(flock, here)
        looped = each(looped, lambda passage: replace(passage, interface="lo"))
        looped = self._hook("prerouting", looped, here, settled=True)
        return self._hook("input", looped, here) + gone

    def _hook(
        self, hook: str, flock: Flock, concerns: Callable[[PacketState], bool], *, settled: bool = False
    ) -> Flock:
        """Send those through a hook's base chains that are still on their way and that it concerns.

        Chains of type nat see what is new, not `settled`, and not translated by another one at the same hook.
        """
        flock, others = divide(flock, concerns)
        for base, chain in base_chains(self._chains, hook):
            if not (settled and base.type == "nat"):
                flock = self._pass(base, chain, flock)
        return flock + others

    def _pass(self, base: BaseChainHook, chain: ListedChain, flock: Flock) -> Flock:
        flock, others = divide(flock, lambda passage: passage.verdict is None and _sees(base, passage))
        decided, undecided = self._walk(chain, flock)
        if base.drops:
            undecided = each(undecided, lambda passage: passage.end(Verdict.DROPPED))
        return decided + undecided + others

    def _walk(self, chain: ListedChain, flock: Flock) -> tuple[Flock, Flock]:
        """Return those about whom the chain decides, and those who leave it for the one that jumped here."""
        decided: Flock = []
        left: Flock = []
        for rule in chain.rules:
            if not flock:
                break
            hit, flock = rule.hit(flock)
            for decision, chosen in hit:
                final, returning, onward = self._act(decision, chosen)
                decided += final
                left += returning
                flock += onward
        return decided, left + flock

    def _act(self, decision: ListedVerdict, flock: Flock) -> tuple[Flock, Flock, Flock]:
        """Return those for whom the base chain ends, those who leave this chain, and those who go on in it.

        Who leaves a chain entered by `goto` leaves the one that sent it there, too.
        """
        match decision.way:
            case "end":
                return each(flock, decision.change), [], []
            case "return":
                return [], flock, []
            case "continue":
                return [], [], flock
            case "goto":
                return (*self._walk(self._chains[decision.chain], flock), [])
            case "jump":
                decided, onward = self._walk(self._chains[decision.chain], flock)
                return decided, [], onward


def _sees(base: BaseChainHook, passage: PacketState) -> bool:
    if base.type == "filter":
        return True
    translated = passage.masqueraded if base.hook == "postrouting" else bool(passage.target)
    return passage.packet.state == "NEW" and not translated
