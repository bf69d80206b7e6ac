"""What happens to the node during the soak test: each action of each actor, and the order in which they act."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kproxy.model.types import Family
from tests.apiserver import ApiServer
from tests.apiserver.relay import Relay
from tests.drift_times import victims
from tests.drift_times.damages import Damage, damages
from tests.drift_times.kernel_state import ALL, State, differing, without_jumps_to_firewall
from tests.drift_times.stranger import Stranger
from tests.lab.modes import no_rules_of_other_mode
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.soak.cluster import DAMAGED, SoakCluster
from tests.soak.node import Proxy
from tests.soak.traffic import EVERY, Window, Windows

OTHER = {"iptables": "nftables", "nftables": "iptables"}
REPAIR_SECONDS = 40.0
"""Seconds after which a damage counts as not repaired."""

LONGEST_API_PAUSE = 30.0
"""How long kproxy waits at most before it sends another request to an API server that has failed many times."""

FAULT_SECONDS = 2.5
"""How long a fault lasts, in seconds."""

_ONE_SERVICE = ("nat <svc>", "nat <sep", "element service-ips { <ip>", "element service-endpoints { <ip>")
FOREIGN = """
table inet foreign-{0} {{
    set addresses {{ type ipv4_addr; elements = {{ 192.0.2.1, 192.0.2.{1} }} }}
    chain out {{ type filter hook output priority 10; ip daddr @addresses counter; }}
}}
"""


@dataclass(frozen=True)
class Action:
    """One kind of action, and how often it occurs in each round. `restarts` says whether it ends the process."""

    name: str
    times: int
    run: Callable[[], str]
    restarts: bool = False


@dataclass
class OpenDamage:
    """A damage that has not been repaired yet, and the parts as they were before."""

    window: Window
    family: Family
    before: State


class Actors:
    """All actors. Each action returns what it did."""

    def __init__(
        self,
        *,
        node: Namespace,
        proxy: Proxy,
        api: ApiServer,
        relay: Relay,
        cluster: SoakCluster,
        windows: Windows,
        strangers: dict[str, Stranger],
        chance: random.Random,
        log: Callable[[str], None],
    ) -> None:
        """`strangers` are the programs that damage the rules of each mode."""
        self._node, self._proxy, self._api, self._relay, self._cluster = node, proxy, api, relay, cluster
        self._windows, self._strangers, self._random, self._log = windows, strangers, chance, log
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._open: list[OpenDamage] = []
        self._foreign = 0
        self.not_repaired: list[str] = []
        self.exits: list[int] = []
        self.flushes = 0
        self.damages = 0

    def actions(self, *, restarts: bool) -> list[Action]:
        """Return the actions of one round in random order, with or without those that restart kproxy."""
        found = [
            Action("change", 24, self._change),
            Action("damage", 5, self._damage),
            Action("foreign", 2, self._change_foreign_rules),
            Action("flush", 1, self._damage_everything),
            Action("api", 1, self._restart_api),
            Action("api", 1, self._stall_api),
            Action("api", 2, self._break_watches),
            Action("api", 1, self._compact),
            Action("api", 1, self._fail_requests),
            Action("host", 1, lambda: self._fail_programs("fail")),
            Action("host", 1, lambda: self._fail_programs("hang")),
            Action("host", 1, self._exhaust_descriptors),
            Action("process", 1, self._kill, restarts=True),
            Action("process", 1, self._roll, restarts=True),
            Action("process", 1, self._switch_modes, restarts=True),
        ]
        deck = [each for each in found for _ in range(each.times) if restarts or not each.restarts]
        self._random.shuffle(deck)
        return deck

    def tick(self) -> None:
        """Undo the faults that have lasted long enough, and look at the damages that have not been repaired."""
        now = time.monotonic()
        for each in [each for each in self._undo if each[0] <= now]:
            self._undo.remove(each)
            self._log(each[1])
            each[2]()
        self._look_at_damages()

    def finish(self) -> None:
        """Undo all faults and wait until all damages are repaired."""
        self._undo_faults()
        while self._open:
            self.restart_if_exited()
            self._look_at_damages()
            time.sleep(0.05)
        self.restart_if_exited()

    def restart_if_exited(self) -> None:
        """Start kproxy again if it has exited on its own. It may do so only for a reason that `Proxy` knows."""
        if (code := self._proxy.restart_if_exited()) is not None:
            self.exits.append(code)
            self._log(f"kproxy exited with status {code}")

    def _undo_faults(self) -> None:
        for _, text, undo in self._undo:
            self._log(text)
            undo()
        self._undo.clear()

    def restart(self, mode: str) -> None:
        """Start kproxy, which has exited, and wait for its first sync."""
        self._proxy.start(mode)
        self._proxy.wait_until_synced()

    # Objects and other programs

    def _change(self) -> str:
        return self._cluster.change()

    @property
    def _stranger(self) -> Stranger:
        return self._strangers[self._proxy.mode]

    def _kinds(self, *, everything: bool) -> list[Damage]:
        mode = "nftables" if self._proxy.mode == "nftables" else f"iptables-{self._stranger.variant}"
        found = [each for each in damages(mode) if each.proof == "rules" and each.service == "plain"]
        if everything:
            return [each for each in found if each.parts == ALL]
        return [each for each in found if all(part.startswith(_ONE_SERVICE) for part in each.parts)]

    def _damage(self) -> str:
        """Damage the rules of one Service, and leave it to kproxy to notice."""
        busy = {each.window.service for each in self._open}
        free = [number for number in DAMAGED if victims.name(number) not in busy]
        if not free:
            return "no Service is left to damage"
        number, family = self._random.choice(free), self._random.choice(list(Family))
        damage = self._random.choice(self._kinds(everything=False))
        try:
            names = self._stranger.names(family, number)
            parts = self._stranger.parts(damage, names)
            before = self._parts(family, parts)
            window = Window(victims.name(number), f"{family.value}: {damage.name}", time.monotonic())
            self._stranger.run(damage.command, names)
        except RuntimeError as error:
            # Either kproxy is writing just now, or it has not restored the rules after its start.
            return f"cannot {damage.name}: {error}"
        self._windows.all.append(window)
        self._open.append(OpenDamage(window, family, before))
        self.damages += 1
        return f"{victims.name(number)}, {window.cause}"

    def _parts(self, family: Family, parts: Sequence[str]) -> State:
        """Read parts of the rules. Chains that other Services use may change at any time, so they do not count."""
        found = self._stranger.read(family, tuple(parts))
        return {part: found.get(part, []) for part in parts}

    def _look_at_damages(self) -> None:
        for each in list(self._open):
            now = time.monotonic()
            if self._parts(each.family, list(each.before)) == each.before:
                each.window.ended = time.monotonic()
                self._open.remove(each)
                self._log(f"repaired after {each.window.ended - each.window.began:.2f} s: {each.window.cause}")
            elif now - each.window.began > REPAIR_SECONDS:
                self.not_repaired.append(f"{each.window.service}, {each.window.cause}")
                self._log(f"not repaired: {each.window.service}, {each.window.cause}")
                self._open.remove(each)
                self._restart_gently()
                each.window.ended = time.monotonic()

    def _restart_gently(self) -> None:
        self._undo_faults()
        self._proxy.terminate()
        self.restart(self._proxy.mode)

    def _damage_everything(self) -> str:
        """Flush or delete a whole table, and wait until it is as before."""
        self._settle()
        family = self._random.choice(list(Family))
        damage = self._random.choice(self._kinds(everything=True))
        try:
            names = self._stranger.names(family, DAMAGED[0])
        except RuntimeError as error:
            return f"cannot {damage.name}: {error}"
        before = self._rules()
        text = f"{family.value}: {damage.name}"
        with self._windows.open(EVERY, text) as window:
            try:
                self._stranger.run(damage.command, names)
            except RuntimeError as error:
                return f"cannot {damage.name}: {error}"
            self.flushes += 1
            while (after := self._rules()) != before:
                self._proxy.check()
                if time.monotonic() - window.began > REPAIR_SECONDS:
                    parts = [part for each in Family for part in differing(before[each], after[each])]
                    self.not_repaired.append(f"{text}: {', '.join(parts[:3])}")
                    self._restart_gently()
                    break
                time.sleep(0.05)
        return f"{text}: repaired after {window.ended - window.began:.2f} s"

    def _rules(self) -> dict[Family, State]:
        return {family: _in_use(without_jumps_to_firewall(self._stranger.read(family))) for family in Family}

    def _settle(self) -> None:
        """Wait until all faults and damages are over and kproxy has programmed all changes."""
        self.finish()

        def synced() -> bool:
            self.restart_if_exited()
            return self._proxy.has_synced()

        wait_until(synced, "kproxy has synced each family")
        self.wait_for_mark()
        states: list[State] = []
        wait_until(lambda: self._is_stable(states), "the rules do not change")

    def wait_for_mark(self) -> None:
        """Change a Service and its endpoint, and wait until both changes are programmed, and so all earlier ones."""
        marks = self._cluster.put_mark()
        wait_until(
            lambda: all(each in str(self._stranger.read(family)) for family in Family for each in marks[family]),
            "kproxy programs the last change",
            seconds=LONGEST_API_PAUSE + HANG_GUARD,
        )

    def _is_stable(self, states: list[State]) -> bool:
        states += [self._stranger.read(family) for family in Family]
        time.sleep(0.3)
        return len(states) >= 4 and states[-2:] == states[-4:-2]

    def _change_foreign_rules(self) -> str:
        """Add a table of another program, or delete it again."""
        if self._foreign:
            self._node.run(["nft", "delete", "table", "inet", f"foreign-{self._foreign}"], check=False)
            self._foreign = 0
            return "delete a foreign table"
        self._foreign = self._random.randrange(1, 200)
        self._node.run(["nft", "-f", "-"], FOREIGN.format(self._foreign, self._foreign + 1))
        return "add a foreign table"

    # The API server

    def _later(self, text: str, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + FAULT_SECONDS, text, undo))

    def _is_pending(self, text: str) -> bool:
        return any(each[1] == text for each in self._undo)

    def _restart_api(self) -> str:
        if not self._is_pending("start the API server"):
            self._api.stop()
            self._later("start the API server", self._api.start)
        return "stop the API server"

    def _stall_api(self) -> str:
        self._relay.stall(new=self._random.random() < 0.5)
        self._later("let the API server's bytes pass", self._relay.resume)
        return "stall the API server's connections"

    def _break_watches(self) -> str:
        name, action = self._random.choice(
            (
                ("drop", self._api.drop_watches),
                ("end", self._api.end_watches),
                ("cut", self._api.cut_watches_mid_line),
                ("fail", self._api.fail_watches),
                ("expire", self._api.expire_watches),
                ("silence", self._api.silence_watches),
            )
        )
        action()
        if name == "silence":
            self._later("drop the silent watches", self._relay.cut)
        return f"{name} all watches"

    def _compact(self) -> str:
        self._api.compact()
        self._relay.cut()
        return "compact the history and break all connections"

    def _fail_requests(self) -> str:
        status = self._random.choice((429, 500, 503))
        self._api.fail_requests(status, 3, retry_after=1 if status == 429 else None)
        self._relay.cut()
        return f"answer 3 requests with status {status}, and break all connections"

    # The host and the process

    def _fail_programs(self, kind: str) -> str:
        self._proxy.set_fault(kind)
        self._later("let the programs work", lambda: self._proxy.set_fault(""))
        return f"let the programs {kind}"

    def _exhaust_descriptors(self) -> str:
        if not self._proxy.has_synced():
            return "kproxy is starting"
        self._proxy.exhaust_descriptors()
        self._later("allow descriptors", self._proxy.restore_descriptors)
        return "let kproxy open no descriptors"

    def _kill(self) -> str:
        self._proxy.kill()
        time.sleep(self._random.uniform(0.0, 1.0))
        self._proxy.start(self._proxy.mode)
        return "kill -9 kproxy and start it again"

    def _roll(self) -> str:
        code = self._proxy.terminate()
        self._proxy.start(self._proxy.mode)
        return f"stop kproxy (exit status {code}) and start it again"

    def _switch_modes(self) -> str:
        """Restart kproxy in the other mode, and then in the first one again."""
        first = self._proxy.mode
        for mode in (OTHER[first], first):
            self.finish()
            self._proxy.terminate()
            self.restart(mode)
            wait_until(lambda: no_rules_of_other_mode(self._node, mode), f"only rules of {mode} mode")  # noqa: B023
            time.sleep(0.5)
        return f"{OTHER[first]} mode and back"


def _in_use(state: State) -> State:
    """Drop the nftables chains to which nothing leads. kproxy deletes them later, and does not restore them."""
    text = "\n".join(line for lines in state.values() for line in lines)
    targets = set(re.findall(r"(?:goto|jump) (\S+)", text))
    return {
        part: lines
        for part, lines in state.items()
        if not part.startswith("chain ") or part.split()[1] in targets or any(" hook " in line for line in lines)
    }
