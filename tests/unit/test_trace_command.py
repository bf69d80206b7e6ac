"""The command `kproxy trace`: its text, JSON, names, exit codes and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from kproxy.cli.main import main
from kproxy.cli.output import WIDTH, Style
from kproxy.cli.trace_text import trace_lines
from kproxy.diagnose.trace.ask import TracedPacket, trace_dumps
from kproxy.diagnose.trace.cluster_objects import read_cluster_objects
from kproxy.diagnose.trace.dumps import Dumps
from tests.recordings import GOLDEN, SCENARIOS
from tests.schemas import FOLDER as SCHEMAS

DUMPS = Path(__file__).parents[1] / "dumps"
CLUSTER = GOLDEN / "clusterip"
NODE = ("--node-address=10.99.0.2", "--node=node-1", f"--objects={CLUSTER}")
CASES = {
    "docker": (f"--dump={DUMPS}/docker.iptables-save.txt", "--in-interface=veth1"),
    "site": (f"--dump={DUMPS}/site.nft.txt", "--in-interface=veth1"),
    "site in JSON": (f"--dump={DUMPS}/site.nft.json", "--in-interface=veth1"),
    "firewalld": (f"--dump={DUMPS}/firewalld.nft.json", "--in-interface=cni0"),
    "calico": (f"--dump={DUMPS}/calico.iptables-save.txt", f"--dump={DUMPS}/kproxy.nft.txt", "--in-interface=cali11"),
    "kube-proxy": (f"--dump={CLUSTER}/iptables-save.txt", f"--dump={CLUSTER}/ip6tables-save.txt"),
    "nothing known": (f"--dump={CLUSTER}/nft-ip.txt",),
}
CODES = {"works": 0, "broken": 1, "unknown": 3}


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main(["trace", *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("to", ["10.96.1.1:80", "10.96.1.1:81", "10.99.0.2:22/tcp", "10.96.0.10:53/udp"])
def test_formats(capsys: pytest.CaptureFixture[str], name: str, to: str) -> None:
    known = () if name == "nothing known" else NODE
    flags = ("--from=10.244.1.5", f"--to={to}", *CASES[name], *known)
    code, text, _ = run(capsys, *flags)
    lines = text.splitlines()
    assert lines[0].startswith(f"{'UDP' if 'udp' in to else 'TCP'} from 10.244.1.5 to {to.partition('/')[0]}")
    assert any(line.startswith("Result: ") for line in lines)
    assert [line for line in lines if len(line) > WIDTH] == []
    found = json.loads(run(capsys, *flags, "-o=json")[1])
    Draft202012Validator(json.loads((SCHEMAS / "PacketTrace.json").read_text())).validate(found)
    assert CODES[found["answer"]] == code
    assert yaml.safe_load(run(capsys, *flags, "--output=yaml")[1]) == found


def test_text_says_what_happens_in_the_order_of_the_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "--from=10.244.1.5", "--to=10.96.1.1:80", *CASES["site"], *NODE)
    assert code == 1
    assert (
        text
        == """\
TCP from 10.244.1.5 to 10.96.1.1:80, received on veth1
 1 prerouting      ip kube-proxy services, handle 35: demo/web:http
 2 prerouting      DNAT to 33% 10.244.1.1:8080 (node-1), 33% 10.244.2.1:8080 (node-2),
                   33% 10.244.2.2:8080 (node-2)
 3 forward         inet site web, handle 6: `ip daddr . tcp dport { 10.244.2.0/24 . 8080 } drop
                   comment "no web traffic to other nodes"`  DROPPED (67% of connections)
 4 forward         inet site forward, handle 11: `ip saddr 10.244.0.0/16 accept`  accepted (only to
                   10.244.1.1:8080)
Result: 33% of new connections reach 10.244.1.1:8080 of demo/web:http; 67% of new connections are
  dropped after DNAT, by a rule that is not kproxy's.
Replies: are sent to 10.244.1.5 itself, and must return through this node to be translated back.
"""
    )


def test_json_has_every_rule_with_table_chain_and_effect(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--from=10.244.1.5", "--to=10.96.1.1:80", *CASES["docker"], *NODE, "-o=json")[1])
    assert found["service"] == "demo/web:http"
    (first, *_) = found["paths"]
    steps = [(step["hook"], step["rule"]["table"], step["rule"]["chain"], step["effect"]) for step in first["steps"]]
    assert steps[0] == ("prerouting", "nat", "PREROUTING", "jump")
    assert ("prerouting", "nat", "KUBE-SERVICES", "jump") in steps
    assert steps[-1] == ("forward", "filter", "FORWARD", "policy-drop")
    assert sum(path["probability"] for path in found["paths"]) == pytest.approx(1, abs=1e-4)
    texts = [step["rule"]["text"] for step in first["steps"]]
    assert any("--to-destination 10.244.1.1:8080" in text for text in texts)


def test_source_as_a_pod(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pod = {
        "kind": "Pod",
        "metadata": {"namespace": "demo", "name": "cart"},
        "spec": {"nodeName": "node-1"},
        "status": {"podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00:10:244:1::5"}]},
    }
    objects = tmp_path / "all.yaml"
    objects.write_text(yaml.safe_dump({"kind": "List", "items": [pod]}))
    flags = (f"--objects={objects}", f"--dump={CLUSTER}/iptables-save.txt", "--to=10.96.1.1:80")
    code, text, _ = run(capsys, "--from=pod/demo/cart", *flags)
    assert code == 0
    assert text.startswith("TCP from 10.244.1.5 (pod/demo/cart) to 10.96.1.1:80")
    code, _, error = run(capsys, "--from=pod/demo/other", *flags)
    assert (code, error.count("\n")) == (2, 1)
    assert "no Pod demo/other in --objects" in error
    assert run(capsys, "--from=pod/demo/cart", *flags[1:])[0] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=10.0.0.1:80",), "--from=ADDR is required"),
        (("--from=10.0.0.2",), "--to=ADDR:PORT is required"),
        (("--from=x", "--to=10.0.0.1:80"), "--from: must be an IP address"),
        (("--from=10.0.0.2", "--to=10.0.0.1"), "--to: must be ADDR:PORT"),
        (("--from=10.0.0.2", "--to=10.0.0.1:70000"), "--to: must be ADDR:PORT"),
        (("--from=10.0.0.2", "--to=[fd00::1]:80"), "must be addresses of the same IP family"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80/icmp"), "--to: must be ADDR:PORT"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", "--dump=/nonexistent"), "--dump: /nonexistent: No such file"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", f"--dump={__file__}"), "neither the output of iptables-save"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", "--node-address=10.0.0.1"), "--node-address needs --dump"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", "--dump=x", "--node-address=x"), "--node-address: must be an IP"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", "--dump=x", "--live"), "--live watches packets on this node"),
        (("--from=10.0.0.2", "--to=10.0.0.1:80", "--objects=/nonexistent"), "--objects: /nonexistent"),
    ],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    code, text, error = run(capsys, *flags)
    assert (code, text, error.count("\n")) == (2, "", 1)
    assert message in error


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_line_is_too_wide(scenario: str) -> None:
    objects = read_cluster_objects(
        (GOLDEN / scenario / f"{name}.json").read_bytes() for name in ("services", "endpointslices", "nodes")
    )
    dumps = Dumps()
    dumps.add((GOLDEN / scenario / "iptables-save.txt").read_text(), "iptables-save")
    dumps.add((GOLDEN / scenario / "ip6tables-save.txt").read_text(), "ip6tables-save")
    for address in list(objects.cluster_ips)[:3]:
        source = "fd00:10:244:1::5" if ":" in address else "10.244.1.5"
        packet = TracedPacket(source=source, destination=address, port=80, protocol="TCP")
        lines = list(trace_lines(trace_dumps(packet, dumps, (), objects, "node-1"), Style()))
        assert [line for line in lines if len(line) > WIDTH] == []
