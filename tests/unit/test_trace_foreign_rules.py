"""`kproxy trace` through the rules of other programs, from dumps: verdicts, and what cannot be known."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kproxy.diagnose.trace.ask import TracedPacket, trace_dumps
from kproxy.diagnose.trace.cluster_objects import read_cluster_objects
from kproxy.diagnose.trace.dumps import DumpError, Dumps
from kproxy.diagnose.trace.trace import PacketTrace
from kproxy.model.types import Protocol
from tests.recordings import GOLDEN

FOLDER = Path(__file__).parents[1] / "dumps"
OBJECTS = read_cluster_objects(
    (GOLDEN / "clusterip" / f"{name}.json").read_bytes() for name in ("services", "endpointslices", "nodes")
)
POD, CLIENT, NODE = "10.244.1.5", "198.51.100.10", "10.99.0.2"
SERVICE = "10.96.1.1"
DUMPS = {
    "docker": ("docker.iptables-save.txt", "docker.nft.txt"),
    "ufw": ("ufw.iptables-save.txt", "ufw.nft.json"),
    "firewalld": ("firewalld.nft.txt",),
    "firewalld in JSON": ("firewalld.nft.json",),
    "site": ("site.nft.txt",),
    "site in JSON": ("site.nft.json",),
    "cilium": ("cilium.iptables-save.txt",),
    "flannel": ("flannel.iptables-save.txt",),
    "calico": ("calico.iptables-save.txt", "kproxy.nft.txt"),
}
REACHES = "every new connection reaches one of 3 endpoints of demo/web:http"
POLICY = "every new connection is dropped after DNAT, by the policy of a chain that is not kproxy's"
REJECTED = "every new connection is rejected, by a rule that is not kproxy's"
NO_SERVICE = "no rule of a Service translates"


def dumps_of(name: str) -> Dumps:
    dumps = Dumps()
    for file in DUMPS[name]:
        dumps.add((FOLDER / file).read_text(), file)
    return dumps


def ask(name: str, source: str, to: str, interface: str | None = None, *, objects: bool = True) -> PacketTrace:
    address, _, rest = to.rpartition(":")
    port, _, protocol = rest.partition("/")
    kind: Protocol = "UDP" if protocol == "udp" else "TCP"
    packet = TracedPacket(source=source, destination=address, port=int(port), protocol=kind, interface=interface)
    if not objects:
        return trace_dumps(packet, dumps_of(name), (), None, "")
    return trace_dumps(packet, dumps_of(name), [NODE], OBJECTS, "node-1")


@pytest.mark.parametrize(
    ("name", "packet", "answer", "summary"),
    [
        # Docker's policy drops what Kubernetes forwards, except masqueraded connections, which KUBE-FORWARD accepts.
        ("docker", (POD, f"{SERVICE}:80", "veth1"), "broken", POLICY),
        ("docker", (CLIENT, f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("docker", (NODE, f"{SERVICE}:80", None), "works", REACHES),
        ("docker", (CLIENT, f"{NODE}:22", "eth0"), "broken", NO_SERVICE),
        ("ufw", (POD, f"{SERVICE}:80", "veth1"), "broken", POLICY),
        ("ufw", (NODE, f"{SERVICE}:80", None), "works", REACHES),
        ("ufw", (CLIENT, f"{NODE}:9", "eth0"), "broken", "every new connection is dropped, by the policy"),
        ("ufw", (CLIENT, f"{NODE}:6443", "eth0"), "broken", NO_SERVICE),
        # firewalld accepts translated connections, and rejects the others at the end of its chains.
        ("firewalld", (CLIENT, f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("firewalld", (CLIENT, f"{NODE}:9", "eth0"), "broken", REJECTED),
        ("firewalld", (CLIENT, f"{NODE}:22", "eth0"), "broken", NO_SERVICE),
        ("firewalld", (CLIENT, f"{NODE}:9", "cni0"), "broken", NO_SERVICE),
        (
            "firewalld",
            (POD, f"{SERVICE}:81", "cni0"),
            "broken",
            "every new connection is rejected, by a rule of the ser",
        ),
        ("firewalld in JSON", (CLIENT, f"{NODE}:9", "eth0"), "broken", REJECTED),
        ("firewalld in JSON", (CLIENT, f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("site", (POD, f"{SERVICE}:80", "veth1"), "broken", "33% of new connections reach 10.244.1.1:8080"),
        ("site", ("198.51.100.20", f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("site", (CLIENT, f"{SERVICE}:80", "eth0"), "broken", POLICY),
        ("site", (CLIENT, "203.0.113.1:53/udp", "eth0"), "broken", f"{NO_SERVICE} 203.0.113.1:53: the packet is sent"),
        ("site in JSON", (POD, f"{SERVICE}:80", "veth1"), "broken", "33% of new connections reach 10.244.1.1:8080"),
        ("site in JSON", ("198.51.100.20", f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("cilium", (POD, f"{SERVICE}:80", "lxc1"), "works", REACHES),
        ("cilium", (CLIENT, f"{SERVICE}:80", "eth0"), "works", REACHES),
        ("flannel", (POD, f"{SERVICE}:80", "cni0"), "works", REACHES),
        ("flannel", (CLIENT, "203.0.113.1:53/udp", "eth0"), "broken", "every new connection is dropped, by the policy"),
    ],
)
def test_verdicts(name: str, packet: tuple[str, str, str | None], answer: str, summary: str) -> None:
    found = ask(name, *packet)
    assert (found.answer, found.unknowns) == (answer, ())
    assert found.summary.startswith(summary)


@pytest.mark.parametrize(
    ("name", "source", "to", "interface", "reason"),
    [
        # Which interface it is decides in Docker's chains; a dump does not tell.
        ("docker", POD, f"{SERVICE}:80", None, "-i docker0"),
        # An IPv4 packet meets no reverse path filter of firewalld, but a limit is a limit.
        ("site", "203.0.113.9", f"{NODE[:-1]}77:9", "eth0", "limit rate 10/second"),
        ("calico", "10.244.1.5", f"{SERVICE}:80", "cali11", "-m rpfilter --validmark --invert"),
    ],
)
def test_what_cannot_be_evaluated_and_matters_is_unknown(
    name: str, source: str, to: str, interface: str | None, reason: str
) -> None:
    found = ask(name, source, to, interface)
    assert reason in {unknown.reason for unknown in found.unknowns}
    assert {path.outcome.verdict for path in found.paths} > {"dropped"}
    assert found.unknown_probability == 1


def test_a_rule_that_cannot_be_evaluated_is_shown_with_both_ways() -> None:
    found = ask("calico", POD, f"{SERVICE}:80", "cali11")
    assert found.answer == "unknown"
    number, unknown = next((i, each) for i, each in enumerate(found.unknowns) if "rpfilter" in each.reason)
    assert unknown.rule is not None
    assert unknown.rule.chain == "cali-PREROUTING"
    assert "-m rpfilter" in unknown.rule.text
    ways = {
        (condition.way, path.outcome.verdict)
        for path in found.paths
        for condition in path.conditions
        if condition.unknown == number
    }
    assert ways >= {("the rule matches", "dropped"), ("the rule does not match", "accepted")}
    assert ("the rule matches", "accepted") not in ways


def test_ipsets_that_do_not_change_the_verdict_do_not_make_it_unknown() -> None:
    """Calico's masquerading depends on ipsets: whether the node is masqueraded is unknown, that it arrives is not."""
    found = ask("calico", NODE, "10.244.2.1:8080")
    (outcome,) = found.outcomes
    assert (outcome.verdict, outcome.masqueraded, found.unknown_probability) == ("accepted", None, 0)


def test_unknown_addresses_of_the_node_matter_only_where_the_ways_differ() -> None:
    assert ask("firewalld", CLIENT, f"{SERVICE}:80", objects=False).answer == "works"
    found = ask("firewalld", CLIENT, f"{NODE}:22", objects=False)
    assert found.answer == "broken"
    assert found.unknowns


def test_nft_alone_shows_iptables_rules_incompletely() -> None:
    dumps = Dumps()
    dumps.add((FOLDER / "ufw.nft.json").read_text(), "ufw.nft.json")
    packet = TracedPacket(source=POD, destination=SERVICE, port=80, protocol="TCP", interface="veth1")
    found = trace_dumps(packet, dumps, [NODE], OBJECTS, "node-1")
    assert found.answer == "unknown"
    assert any("add a dump of iptables-save" in note for note in found.notes)


def damaged(text: str, random: Random) -> str:
    words = text.split(" ")
    for _ in range(random.randint(1, 20)):
        place = random.randrange(len(words))
        words[place : place + random.randint(0, 1)] = [random.choice(words)] * random.randint(0, 1)
    return " ".join(words)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.*") if path.suffix != ".md"))
def test_damaged_dumps_are_an_error_or_leave_a_sound_answer(file: str) -> None:
    random, text = Random(file), (FOLDER / file).read_text()
    for _ in range(8):
        dumps = Dumps()
        interface = random.choice((None, "eth0"))
        packet = TracedPacket(source=POD, destination=SERVICE, port=80, protocol="TCP", interface=interface)
        try:
            dumps.add(damaged(text, random), file)
            found = trace_dumps(packet, dumps, [NODE], OBJECTS, "node-1")
        except DumpError:
            continue
        total = sum(outcome.probability for outcome in found.outcomes) + found.unknown_probability
        assert total == pytest.approx(1, abs=1e-4) or "too many rules" in found.summary


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}', "*filter"])
def test_other_files_are_not_dumps(text: str) -> None:
    with pytest.raises(DumpError, match="x: "):
        Dumps().add(text, "x")
