"""One simulated history: random events in a cluster, in kproxy's threads, in the kernel and in other processes."""

from __future__ import annotations

import errno
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from random import Random
from unittest.mock import patch

from msgspec import Struct

from kproxy.host.commands import CommandError
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import PORT_CHAIN_PREFIXES, ChainName, is_shard
from kproxy.iptables.runner import RestoreError
from kproxy.model.context import Context, LocalhostTraffic
from kproxy.model.drift import RepairResult, RulesChanged, Touched
from kproxy.model.sync_report import SyncError, SyncResult
from kproxy.model.types import Family, ServiceKey
from kproxy.nftables import backend as nftables_backend
from kproxy.nftables import kernel as nftables_kernel
from kproxy.nftables import repair as nftables_repair
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import OwnGenerations, TableError
from kproxy.nftables.rule_content import rule_content
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import Backend, FamilySync
from kproxy.sync.reconciler import Attempted, Compared, Outcome, Repaired
from tests.simulation.capabilities import repairs_exactly
from tests.simulation.cluster import NAMESPACE, NODE_ADDRESSES, Cluster
from tests.simulation.expected import Expectations, Mark
from tests.simulation.faults import FAULT_RATE, Faults, faulty_iptables, faulty_table
from tests.simulation.kernels import (
    Generations,
    Refusal,
    SimulatedIptables,
    SimulatedTable,
    damage_iptables,
    damage_table,
)
from tests.simulation.outcomes import DROP, NONE, REJECT, SOURCES, Frontend
from tests.simulation.packets import iptables_outcomes, nftables_outcomes, packet_to
from tests.simulation.process import FORGIVEN, Process, make_context

MAX_SETTLE_SECONDS = 4_000.0
"""Virtual seconds after the last fault within which everything must be right."""
EXPECTED_ERRORS = (SyncError, TableError, CommandError, RestoreError)
LOCALHOST_TRAFFIC: tuple[LocalhostTraffic, ...] = ("", "reject", "proxy-hold")
MAX_SETTLE_STEPS = 5_000
INTERLEAVED = 0.25
"""The probability that other threads go on before or after an operation of the kernel."""
CHECKED_FRONTENDS = 2
"""The number of frontends to which packets are sent after each transaction."""


_SERVICE = re.compile(r"ns/\w+")
Chains = dict[tuple[str, str], list[str]]
"""The rules of iptables chains, by table and name."""


class ViolationError(AssertionError):
    """kproxy broke a promise. The message is one or more lines."""


class BrokenPromiseError(BaseException):
    """Ends a history, even inside of code of kproxy that catches every `Exception`."""


class CrashError(BaseException):
    """kproxy is killed."""


class LostDamage(Struct):
    """Damage that has not been repaired: when it was done, whether kproxy will be told, and whether it has been."""

    number: int
    told: bool = False


class FamilyWorld:
    """One IP family: its kernel, what may be in it, and the damage that nobody has repaired."""

    def __init__(self, family: Family, kernel: SimulatedTable | SimulatedIptables) -> None:
        self.family = family
        self.kernel = kernel
        self.expected = Expectations(family)
        self.mark: Mark | None = None
        self.job_began = 0
        self.reads_kernel = False
        self.has_read = False
        self.comparison_began: int | None = None
        self.comparisons = 0
        self.damage: list[int] = []
        """When each unrepaired damage was done, as a count of events."""
        self.damages = 0
        self.undelivered: list[RulesChanged] = []


class World:
    """Everything in one history. Equal seeds make equal histories."""

    def __init__(self, seed: int, *, show: Callable[[str], object] | None = None) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.show = show
        self.now = 1000.0
        self.depth = 0
        self.event = 0
        self.settling = False
        self.nftables = random.random() < 0.5
        self.mode = "nftables" if self.nftables else "iptables"
        every = tuple(Family)
        families = random.choice(((every[0],), (every[0],), (every[1],), every))
        self.cluster = Cluster(random, "abcde"[: random.randint(2, 5)], families)
        self.faults = Faults(random, random.choice((0.0, FAULT_RATE, FAULT_RATE)))
        self.exact = repairs_exactly(self.mode)
        self.damaging = random.random() < 0.5
        self.loses_notices = random.random() < 0.5
        """Whether other processes' changes are sometimes not noticed, so that only comparisons can find them."""
        self.poisoned: set[ServiceKey] = set()
        self.poisoning = random.random() < 0.35
        self.crashing = random.random() < 0.4
        self.options = Context(
            Family.IPV4,
            "",
            masquerade_all=random.random() < 0.2,
            node_port_addresses=random.choice((None, None, NODE_ADDRESSES)),
            localhost_traffic=LOCALHOST_TRAFFIC[seed % len(LOCALHOST_TRAFFIC)] if self.nftables else "",
        )
        self.sizes = random.choice((1, 2, 1000)), random.choice((1, 6, 6, 600, 600)), random.choice((1, 3, 1000))
        generations = Generations()
        self.families = {family: self._family(family, generations) for family in families}
        self.counts: Counter[str] = Counter()
        self.process = self._new_process()

    def _family(self, family: Family, generations: Generations) -> FamilyWorld:
        if self.nftables:
            table = SimulatedTable(family, generations)
            world = FamilyWorld(family, table)
            table.refuse = partial(self._refuse, world, table)
            return world
        kernel = SimulatedIptables()
        return FamilyWorld(family, kernel)

    def _backends(self) -> dict[Family, Backend]:
        generations = OwnGenerations()
        found: dict[Family, Backend] = {}
        batch, rules, threshold = self.sizes
        for family, world in self.families.items():
            step = partial(self._operation, family)
            if isinstance(world.kernel, SimulatedTable):
                kernel = faulty_table(world.kernel, self.faults, step)
                found[family] = NftablesBackend(kernel, generations, batch_frontends=batch)
            else:
                refuse = partial(self._refuse_restore, world, world.kernel)
                programs = faulty_iptables(world.kernel, self.faults, step, refuse)
                found[family] = IptablesBackend(programs, max_transaction_rules=rules, dispatch_threshold=threshold)
        return found

    def _new_process(self) -> Process:
        for world in self.families.values():
            world.mark, world.comparison_began = None, None
            world.undelivered.clear()
        self.cluster.restart_watches()
        needs_comparisons = self.loses_notices or not self.exact
        return Process(
            self._backends(),
            self.options,
            lambda: self.now,
            self.faults,
            nftables=self.nftables,
            check_interval=30.0 if needs_comparisons else None,
            on_outcome=self._on_outcome,
            on_start=self._on_job,
            with_metrics=self.seed % 50 == 0,
        )

    # The history

    def run(self) -> None:
        """Play the history and check its end. Raises `ViolationError`."""
        try:
            self._run()
        except BrokenPromiseError as error:
            raise ViolationError(str(error)) from error

    def _run(self) -> None:
        self.say(f"{self.mode}, {', '.join(each.value for each in self.families)}, Services {self.cluster.names}")
        with no_threads(self.random), unexpected_errors():
            if self.random.random() < 0.8:
                self._protected(self._start_quietly)
            for _ in range(self.random.randint(5, 12)):
                self._protected(self._happen)
                for _ in range(self.random.choice((0, 1, 2, 4, 8))):
                    self._protected(self._step)
            self._settle()
            self._check_end()

    def say(self, text: str) -> None:
        """Print a line of the history, if anybody reads it."""
        if self.show is not None:
            self.show(f"{self.now:8.2f} {'  ' * self.depth}{text}")

    def _protected(self, act: Callable[[], None]) -> None:
        """Do something; if it kills kproxy, start it again."""
        try:
            act()
        except CrashError:
            self.depth = 0
            self._restart()

    def _restart(self) -> None:
        self.say("kproxy starts again")
        self.counts["restart"] += 1
        self.process = self._new_process()

    def _start_quietly(self) -> None:
        """Deliver all lists first, so that there is something to damage."""
        for kind in self.cluster.kinds:
            self.process.messages.put(self.cluster.deliver(kind))
        for _ in range(2 + len(self.families)):
            self._step()

    # Events

    def _happen(self) -> None:
        """Let something happen outside of kproxy."""
        self.event += 1
        random = self.random
        kinds: dict[Callable[[], None], float] = {
            lambda: self.say(self.cluster.change_something()): 50,
            self._damage: 22 if self.damaging else 0,
            self._change_other_table: 4,
            self._poison: 6 if self.poisoning else 0,
            lambda: self.say(self.cluster.restore_backup()): 3,
            self._break_watch: 3,
            self._toggle_failure: 3 if self.faults.rate else 0,
            self._crash: 3 if self.crashing else 0,
            self._pass_time: 6,
        }
        random.choices(list(kinds), list(kinds.values()))[0]()

    def _change_other_table(self) -> None:
        self.say("another process changes another table")
        for world in self.families.values():
            if isinstance(world.kernel, SimulatedTable):
                world.kernel.increment_generation()

    def _break_watch(self) -> None:
        kind = self.random.choice(list(self.cluster.kinds))
        self.say(f"the watch of {kind.__name__} breaks")
        self.cluster.kinds[kind].broken = True

    def _toggle_failure(self) -> None:
        self.faults.down = not self.faults.down
        self.say(f"the kernel is {'down' if self.faults.down else 'up'}")

    def _crash(self) -> None:
        self.say("kproxy is killed")
        raise CrashError

    def _pass_time(self) -> None:
        seconds = self.random.choice((0.1, 1.0, 5.0, 40.0, 700.0))
        self.now += seconds
        self.say(f"{seconds} s pass")

    def _damage(self) -> None:
        world = self.random.choice(list(self.families.values()))
        if not self.exact and world.damages:
            return
        if isinstance(world.kernel, SimulatedTable):
            done = damage_table(world.kernel, self.random, detectable=not self.exact)
        else:
            context = make_context(world.family, self.options, None)
            done = damage_iptables(world.kernel, self.random, context, detectable=not self.exact)
        if done is None:
            return
        text, touched = done
        world.damages += 1
        self.event += 1
        world.damage.append(self.event)
        self.counts["damage"] += 1
        if self.loses_notices and self.random.random() < 0.3:
            self.say(f"damage, never noticed: {world.family.value}: {text}")
            return
        if self.random.random() < 0.15:
            touched = {table: Touched(everything=True) for table in touched}
        self.say(f"damage: {world.family.value}: {text}: {touched}")
        tables = {(world.family, table): each for table, each in touched.items()}
        world.undelivered.append(RulesChanged(tables))

    def _poison(self) -> None:
        key = f"{NAMESPACE}/{self.random.choice(self.cluster.names)}"
        self.poisoned ^= {key}
        self.say(f"the kernel rejects {sorted(self.poisoned)}")

    # Steps of kproxy's threads and of those that talk to them

    def _step(self) -> None:
        choices = self._choices()
        if choices:
            self.random.choice(choices)()
        elif self.process.messages.wake < math.inf and self.random.random() < 0.5:
            self.now = max(self.now, self.process.messages.wake + FORGIVEN)

    def _choices(self) -> list[Callable[[], None]]:
        process = self.process
        found: list[Callable[[], None]] = []
        if process.may_step_reconciler(self.now):
            found += [self._step_reconciler] * 2
        for family, jobs in process.jobs.items():
            if jobs and family not in process.busy:
                found.append(partial(self._step_worker, family))
        behind = [kind for kind, state in self.cluster.kinds.items() if state.behind]
        if behind:
            found.append(partial(self._deliver, behind))
        found += [partial(self._notify, world) for world in self.families.values() if world.undelivered]
        return found

    def _step_reconciler(self) -> None:
        process = self.process
        if process.lock.depth:
            return
        self.now += 2 * FORGIVEN
        process.step_reconciler(100 if self.settling else self.random.choice((1, 2, 100)))
        self._record()

    def _record(self) -> None:
        process = self.process
        changed, process.changed = process.changed, set()
        if not process.reconciler._ready:
            process.changed = None
            return
        if changed is None or changed:
            for family, world in self.families.items():
                world.expected.record(process.store, process.context(family), changed)

    def _step_worker(self, family: Family) -> None:
        self.depth += 1
        self.process.step_worker(family)
        self.depth -= 1

    def _deliver(self, behind: list[type]) -> None:
        kind = self.random.choice(behind)
        deltas = self.cluster.deliver(kind, current=self.settling)
        self.say(f"the watch of {kind.__name__} delivers {len(deltas)} deltas")
        if self.random.random() < 0.3:
            self.process.messages.put(deltas)
        else:
            for delta in deltas:
                self.process.messages.put(delta)

    def _notify(self, world: FamilyWorld) -> None:
        self.say(f"{world.family.value}: a notification arrives")
        self.process.messages.put(world.undelivered.pop(0))

    def _operation(self, family: Family, operation: str) -> None:
        """Let other threads go on before or after an operation of the kernel."""
        process = self.process
        if process.lock.depth:
            raise BrokenPromiseError(f"{operation}: an operation of the kernel while the store is locked")
        if operation in {"before snapshot", "before save"}:
            self.families[family].has_read = True
        if operation.startswith("after") and operation in {"after commit", "after restore"}:
            self._check_packets(self.families[family], self.random.sample)
        if self.settling:
            return
        random = self.random
        if self.crashing and random.random() < 0.01:
            self.say(f"kproxy is killed {operation}")
            raise CrashError
        while random.random() < INTERLEAVED:
            self.now += random.choice((0.0, 0.01, 0.5))
            if random.random() < 0.25:
                self._happen()
            else:
                self._step()

    # Rejections

    def _refuse(self, world: FamilyWorld, table: SimulatedTable, transaction: Transaction) -> Refusal | None:
        """Return the first object of a transaction that the kernel rejects, if any."""
        refused = self._refuse_transaction(table, transaction)
        self._on_refusal(world, refused)
        return refused

    def _refuse_restore(self, world: FamilyWorld, kernel: SimulatedIptables, text: str) -> str | None:
        """Return the first line of a restore that the kernel rejects, if any."""
        refused = self._refuse_line(kernel, text)
        self._on_refusal(world, refused)
        return refused

    def _on_refusal(self, world: FamilyWorld, refused: object) -> None:
        """Forget what is known about rejected Services, if a full sync may remove rules that it does not know."""
        if refused is not None and world.has_read:
            for key in self.poisoned:
                world.expected.lose(key)

    def _refuse_transaction(self, table: SimulatedTable, transaction: Transaction) -> Refusal | None:
        """Return the first object of a transaction that the kernel rejects, if any."""
        if not self.poisoned:
            return None
        for name, elements in transaction.added_elements.items():
            current = table.table.sets.get(name) if table.table else None
            for element in elements:
                key = element.comment.partition(":")[0]
                if key in self.poisoned and not (current and current.elements.get(element.key) == element):
                    return "element", name, element.key, errno.ERANGE
        for chain in transaction.added_rules:
            existing = table.table.chains.get(chain.name) if table.table else None
            if existing is not None and existing.rules == list(chain.rules):
                continue  # the kernel accepts what it has accepted before
            if any(chain.comment.startswith(key) for key in self.poisoned):
                return "chain", chain.name, b"", errno.EOPNOTSUPP
        return None

    def _refuse_line(self, kernel: SimulatedIptables, text: str) -> str | None:
        """Return the first line of a restore that the kernel rejects, if any: a new rule of a per-Service chain."""
        name = text[1 : text.index("\n")]
        for line in text.splitlines() if self.poisoned else ():
            command, _, rest = line.partition(" ")
            chain, _, rule = rest.partition(" ")
            if command not in {"-A", "-I", "-R"} or not chain.startswith(PORT_CHAIN_PREFIXES):
                continue
            if not is_shard(ChainName(name, chain)) and rule not in kernel.tables[name].get(chain, ()):
                named = _SERVICE.search(rule)
                if named and named[0] in self.poisoned:
                    return line
        return None

    # What kproxy reports

    def _on_job(self, family: Family, reads_kernel: bool) -> None:
        world = self.families[family]
        self.event += 1
        world.job_began = self.event
        world.reads_kernel = reads_kernel
        world.has_read = False
        world.mark = world.expected.mark()

    def _on_outcome(self, outcome: Outcome) -> None:
        world = self.families[outcome.family]
        if isinstance(outcome, Attempted):
            self._on_attempt(world, outcome.outcome)
        elif isinstance(outcome, Repaired):
            self.say(f"{world.family.value}: checked: {outcome.outcome!r}")
            self._check_error(outcome.outcome)
            result = outcome.outcome
            complete = isinstance(result, RepairResult) and not (result.needs_full_sync or result.skipped)
            if complete and not world.reads_kernel:  # otherwise, only the next sync looks at the rules
                self._repaired(world)
        elif isinstance(outcome, Compared):
            self.say(f"{world.family.value}: compared: {outcome.outcome!r}")
            self._check_error(outcome.outcome)
            if not world.reads_kernel:  # otherwise, only the next sync looks at the rules
                self._on_comparison(world, complete=outcome.outcome is None)

    def _on_attempt(self, world: FamilyWorld, outcome: SyncResult | Exception) -> None:
        self._check_error(outcome)
        if isinstance(outcome, Exception):
            self.counts["failed sync"] += 1
            self.say(f"{world.family.value}: sync failed: {outcome}")
            return
        rejected = outcome.applied.rejected
        self.counts["sync"] += 1
        self.counts["quarantine"] += bool(rejected)
        self.say(f"{world.family.value}: synced {outcome.services} Services, rejected {dict(rejected)}")
        if world.mark is not None:
            quarantine = self.process.syncs[world.family]._quarantine
            world.expected.finish(world.mark, quarantine.services if quarantine else ())
        if world.has_read or world.damage:
            for key in rejected:
                # This sync restores the rules of a rejected Service from what it reads, if it can: what others have
                # removed, the kernel rejects again. In nftables mode, the rules of its own chains are not read. In
                # iptables mode, kproxy does not know the rules of a chain that was damaged before the first rejection.
                world.expected.lose(key)
        if world.reads_kernel:
            world.damage = [each for each in world.damage if each > world.job_began]
        self._check_packets(world, None)

    def _on_comparison(self, world: FamilyWorld, *, complete: bool) -> None:
        if world.comparison_began is None:
            world.comparison_began = world.job_began
        if complete:
            world.comparisons += 1
            if self.exact:
                world.damage = [each for each in world.damage if each > world.comparison_began]
            world.comparison_began = None

    def _repaired(self, world: FamilyWorld) -> None:
        """Forget damage, once all of it has been noticed and no check of it is waiting."""
        state = self.process.reconciler._families[world.family]
        waiting = world.undelivered or self.process.messages.has_notices() or state.repairs.wait(self.now) is not None
        if self.exact and not self.loses_notices and not waiting and not state.compare_all:
            world.damage = [each for each in world.damage if each > world.job_began]

    def _check_error(self, outcome: object) -> None:
        if isinstance(outcome, Exception) and not isinstance(
            outcome, SyncError | TableError | CommandError | RestoreError
        ):
            raise BrokenPromiseError(f"kproxy has a bug: {outcome!r}") from outcome

    # Promises

    def _check_packets(
        self, world: FamilyWorld, sample: Callable[[list[Frontend], int], list[Frontend]] | None
    ) -> None:
        """Send packets to some frontends, or to all of them, unless other processes have damaged the rules."""
        if world.damage:
            return
        found = world.expected.known_frontends()
        if sample is not None and len(found) > CHECKED_FRONTENDS:
            found = sample(found, CHECKED_FRONTENDS)
        sources = SOURCES[world.family]
        for frontend in found:
            for source in sources if self.settling else (self.random.choice(sources),):
                self._check_packet(world, frontend, source, local_pod=source == sources[-1], during=sample is not None)

    def _check_packet(
        self, world: FamilyWorld, frontend: Frontend, source: str, *, local_pod: bool, during: bool
    ) -> None:
        kernel, packet = world.kernel, packet_to(frontend, source, world.family)
        if isinstance(kernel, SimulatedTable):
            outcomes = nftables_outcomes(kernel.table, packet)
        else:
            outcomes = iptables_outcomes(kernel.tables, packet)
        allowed = world.expected.allowed(frontend, source, local_pod=local_pod, mixed=during and not self.nftables)
        if not self.nftables and during and allowed & {DROP, REJECT}:
            # iptables-restore commits the tables one after another: for a moment, the rule that forwards packets is
            # gone from table nat, and the one that rejects them is not yet in table filter.
            allowed |= {NONE, DROP, REJECT}
        self.counts["packet"] += 1
        if not outcomes <= allowed:
            text = f"{world.family.value}: a packet from {source} to {frontend} gets {sorted(outcomes - allowed)}"
            lines = [f"{text} instead of {sorted(allowed)}", *world.expected.describe(frontend)]
            raise BrokenPromiseError("\n  ".join(lines))

    # The end

    def _settle(self) -> None:
        """Let everything recover."""
        self.say("all faults end")
        self.settling = True
        self.faults.stop()
        self.poisoned.clear()
        self.cluster.repair_objects()
        needed = {}
        for family, world in self.families.items():
            again = self.process.is_comparing(family)
            needed[family] = world.comparisons + 1 + again if self.process.reconciler._check_interval else 0
        deadline = self.now + MAX_SETTLE_SECONDS
        for _ in range(MAX_SETTLE_STEPS):
            if choices := self._choices():
                self.random.choice(choices)()
                continue
            if self.process.is_settled() and all(
                world.comparisons >= needed[family] for family, world in self.families.items()
            ):
                return
            if late := self.process.oversleeps(self.now):
                raise BrokenPromiseError(f"{late}: the reconciler sleeps although a sync is due")
            if self.process.messages.wake > deadline:
                break
            self.now = max(self.now, self.process.messages.wake + FORGIVEN)
        raise BrokenPromiseError(f"kproxy does not settle: {self._unsettled()}")

    def _unsettled(self) -> str:
        process = self.process
        return ", ".join(
            f"{family.value}: sync in {state.schedule.wait(self.now)} s, check in {state.repairs.wait(self.now)} s, "
            f"quarantine until {state.sync.next_retry}, step at {state.next_step}, jobs {len(process.jobs[family])}"
            for family, state in process.reconciler._families.items()
        )

    def _check_end(self) -> None:
        for world in self.families.values():
            self._check_content(world)
            world.damage.clear()
            self._check_packets(world, None)
        self._check_health()

    def _check_content(self, world: FamilyWorld) -> None:
        """Compare the kernel with a fresh start on the same objects."""
        faults = Faults(self.random, 0.0)
        kernel = world.kernel
        _, _, threshold = self.sizes
        fresh: SimulatedTable | SimulatedIptables
        if isinstance(kernel, SimulatedTable):
            fresh = SimulatedTable(world.family, Generations())
            backend: Backend = NftablesBackend(faulty_table(fresh, faults))
        else:
            fresh = SimulatedIptables()
            programs = faulty_iptables(fresh, faults)
            backend = IptablesBackend(programs, dispatch_threshold=threshold)
        store = self.process.store.__class__("node-1", self.process.store._kinds)
        for each in self.cluster.lists():
            store.apply(each)
        FamilySync(backend, partial(make_context, world.family, self.options), large_cluster_endpoints=math.inf).sync(
            store
        )
        context = make_context(world.family, self.options, store.node)
        if isinstance(kernel, SimulatedTable):
            assert isinstance(fresh, SimulatedTable)
            differences = kernel.difference(fresh)
        else:
            assert isinstance(fresh, SimulatedIptables)
            differences = self._chain_differences(kernel.content(context), fresh.content(context))
        if differences:
            text = f"{world.family.value}: the kernel differs from a fresh start"
            raise BrokenPromiseError("\n  ".join([text, *differences]))

    def _chain_differences(self, ours: Chains, theirs: Chains) -> list[str]:
        return [
            f"chain {chain}: {ours.get(chain)} instead of {theirs.get(chain)}"
            for chain in sorted(ours.keys() | theirs.keys())
            if ours.get(chain) != theirs.get(chain)
            and not (chain not in theirs and self._may_remain(*chain, theirs, ours))
        ]

    def _may_remain(self, table: str, name: str, fresh: Chains, ours: Chains) -> bool:
        """Return whether an obsolete chain that nothing uses may remain.

        Its deletion may have failed once, or another process may have restored it, which nobody noticed: comparisons
        look only at the chains that kproxy uses. The hourly full check, which no history has, would delete it.
        """
        used = any(f"-j {name}" in rule for chain in fresh if chain[0] == table for rule in ours.get(chain, ()))
        may_remain = self.faults.injected.total() > 0 or self.loses_notices
        return may_remain and name.startswith(PORT_CHAIN_PREFIXES) and not used

    def _check_health(self) -> None:
        process = self.process
        if not process.health.is_healthy(self.now):
            raise BrokenPromiseError("kproxy is not healthy")
        for family in self.families:
            results = [report.result for report in process.reports if report.family is family and report.result]
            if results[-1].counts.quarantined:
                raise BrokenPromiseError(f"{family.value}: {results[-1].counts.quarantined} Services are quarantined")
        if process.metrics is not None:
            self._check_metrics(process)

    def _check_metrics(self, process: Process) -> None:
        assert process.metrics is not None
        metrics = process.metrics._metrics
        for family in self.families:
            reports = [report for report in process.reports if report.family is family]
            failures = sum(report.result is None for report in reports)
            pairs = {
                "failures": (metrics.failures.values()[family.value,], failures),
                "quarantined": (metrics.quarantined.values()[family.value,], 0),
                "pending Services": (metrics.services_pending.values()[()], 0),
            }
            for name, (value, expected) in pairs.items():
                if value != expected:
                    raise BrokenPromiseError(f"{family.value}: the metric of {name} is {value} instead of {expected}")


# Without threads

_rule_content = lru_cache(1 << 14)(rule_content)


@contextmanager
def no_threads(random: Random) -> Iterator[None]:
    """Commit batches of nftables mode in the same thread, as early or as late as a thread might."""

    class Call:
        def __init__(self, call: Callable[[], object]) -> None:
            self._call: Callable[[], object] | None = call
            self._error: BaseException | None = None
            if random.random() < 0.5:
                self.join()

        def join(self) -> None:
            call, self._call = self._call, None
            try:
                if call is not None:
                    call()
            except BaseException as error:  # noqa: BLE001 - raised again by `result`
                self._error = error

        def result(self) -> None:
            self.join()
            if self._error is not None:
                raise self._error

    with (
        patch.object(nftables_backend, "BackgroundCall", Call),
        # Histories have the same rules again and again.
        patch.object(nftables_repair, "rule_content", _rule_content),
        # A commit for one family may be interrupted by one for the other, for which nobody could wait.
        patch.object(nftables_kernel, "MAX_COMMIT_WAIT_SECONDS", 0.0),
    ):
        yield


class _Unexpected(logging.Handler):
    """Turns the reports of unexpected exceptions into violations, and ignores all other lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if "unexpected" in record.getMessage():
            raise BrokenPromiseError(record.getMessage())


@contextmanager
def unexpected_errors() -> Iterator[None]:
    """Raise a `ViolationError` when kproxy logs an unexpected exception; hide all other lines."""
    log, handler = logging.getLogger("kproxy"), _Unexpected(logging.ERROR)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.ERROR)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
