"""What iptables rules do to a packet: the hooks it passes, and a walk through their chains.

A packet is not followed once but as a flock, which divides wherever a rule hits by chance.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.iptables_rules import SavedRules, SimulatedRule, read_dump
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


class IptablesSimulator:
    """The rules of one family, as `iptables-save` or `ip6tables-save` printed them.

    Raises `UnknownRuleError` if the text holds anything that is not understood.
    """

    def __init__(self, dump: str, family: Family) -> None:
        self._dump: SavedRules = read_dump(dump)
        self._family = family

    def send(self, packet: Packet) -> FateDistribution:
        """Return what may become of the packet; `ValueError` if it is of the other family.

        The hooks are those of netfilter's packet flow: destinations are translated before routing
        decides between this node and elsewhere, and only for the first packet of a connection.
        """
        return follow(packet, self._family, self._come_in, self._go_out)

    def _come_in(self, flock: Flock) -> Flock:
        flock = self._translate("PREROUTING", flock, anywhere)
        flock = self._filter("INPUT", flock, here)
        flock = self._filter("FORWARD", flock, elsewhere)
        flock = self._translate("INPUT", flock, here)
        return self._translate("POSTROUTING", flock, elsewhere)

    def _go_out(self, flock: Flock) -> Flock:
        """Follow a packet of the node's own; to an address of the node's own, it comes in again by `lo`.

        It is then still the first of its connection for the filter table, while its translation is settled.
        """
        flock = self._translate("OUTPUT", flock, anywhere)
        flock = self._filter("OUTPUT", flock, anywhere)
        flock = self._translate("POSTROUTING", flock, anywhere)
        looped = [(replace(passage, interface="lo"), share) for passage, share in flock]
        return self._filter("INPUT", looped, here)

    def _translate(self, chain: str, flock: Flock, where: Callable[[PacketState], bool]) -> Flock:
        return self._hook("nat", chain, flock, lambda passage: passage.packet.state == "NEW" and where(passage))

    def _filter(self, chain: str, flock: Flock, where: Callable[[PacketState], bool]) -> Flock:
        return self._hook("filter", chain, flock, where)

    def _hook(self, table: str, chain: str, flock: Flock, concerns: Callable[[PacketState], bool]) -> Flock:
        """Send those through a built-in chain that are still on their way and that it concerns."""
        flock, others = divide(flock, lambda passage: passage.verdict is None and concerns(passage))
        found = self._dump.tables[table].get(chain)
        if not flock or found is None:
            return flock + others
        decided, undecided = self._walk(table, chain, flock)
        if found.policy == "DROP":
            undecided = each(undecided, lambda passage: passage.end(Verdict.DROPPED))
        return decided + undecided + others

    def _walk(self, table: str, chain: str, flock: Flock) -> tuple[Flock, Flock]:
        """Return those about whom the chain decides, and those who leave it at its end or by RETURN."""
        decided: Flock = []
        left: Flock = []
        for rule in self._dump.tables[table][chain].rules:
            hit, flock = self._split(rule, flock)
            if not hit:
                continue
            if rule.target == "RETURN":
                left += hit
                continue
            final, onward = self._act(table, rule, hit)
            decided += final
            flock += onward
            if not flock:
                break
        return decided, left + flock

    def _split(self, rule: SimulatedRule, flock: Flock) -> tuple[Flock, Flock]:
        """Return those that the rule hits, counted and remembered as it says, and those that it does not."""
        hit, missed = divide(flock, lambda passage: self._matches(rule, passage))
        if rule.chance < 1.0:
            missed += [(passage, share * (1.0 - rule.chance)) for passage, share in hit]
            hit = [(passage, share * rule.chance) for passage, share in hit if rule.chance]
        if rule.counter:
            hit = each(hit, lambda passage: replace(passage, counted=(*passage.counted, rule.counter)))
        if rule.remembers:
            hit = each(hit, lambda passage: replace(passage, remembered=True))
        return hit, missed

    def _matches(self, rule: SimulatedRule, passage: PacketState) -> bool:
        if not all(match(passage) for match in rule.matches):
            return False
        return not rule.affinity or not passage.packet.remembered.isdisjoint(self._dump.lists.get(rule.affinity, ()))

    def _act(self, table: str, rule: SimulatedRule, flock: Flock) -> tuple[Flock, Flock]:
        """Return those for whom the rule ends the hook, and those who go on to the next rule."""
        if not rule.target:
            return [], flock
        if rule.target == "MARK":
            return [], each(flock, lambda passage: replace(passage, mark=_marked(passage.mark, rule)))
        if rule.target in _FINAL:
            change = _FINAL[rule.target]
            return each(flock, lambda passage: change(passage, rule)), []
        return self._walk(table, rule.target, flock)


_FINAL: dict[str, Callable[[PacketState, SimulatedRule], PacketState]] = {
    "ACCEPT": lambda passage, _: passage,
    "DROP": lambda passage, _: passage.end(Verdict.DROPPED),
    "REJECT": lambda passage, rule: passage.end(Verdict.REJECTED, rule.reply),
    "MASQUERADE": lambda passage, _: replace(passage, masqueraded=True),
    "DNAT": lambda passage, rule: passage.translate(rule.socket, rule.address, rule.port),
}
"""What the targets that end a packet's way through a hook do to it."""


def _marked(mark: int, rule: SimulatedRule) -> int:
    """Apply `--set-xmark value/mask`: clear the bits of the mask, then flip those of the value."""
    return (mark & ~rule.mask) ^ rule.value
