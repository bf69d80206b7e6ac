"""Names of objects never appear in an anonymized text, and everything else stays as it is."""

from __future__ import annotations

from kproxy.diagnose.anonymize import Anonymizer
from kproxy.kube.codec.conversion import is_subdomain


def anonymizer() -> Anonymizer:
    made = Anonymizer(b"secret")
    made.add_objects(["shop/web", "shop/drop", "default/kubernetes"])
    made.add_nodes(["node-1", "drop.example.com", "worker7.example.com", ""])
    return made


def test_names_in_rules_and_log_lines_are_replaced() -> None:
    made = anonymizer()
    shop, web, node = made.name("shop"), made.name("web"), made.name("node-1")
    rule = '-A KUBE-SERVICES -d 10.96.0.1/32 -m comment --comment "{}:http cluster IP" -j DROP'
    assert made.text(rule.format("shop/web")) == rule.format(f"{shop}/{web}")
    assert (
        made.text("chain service-ABC-shop/web/tcp/http { drop }")
        == f"chain service-ABC-{shop}/{web}/tcp/http {{ drop }}"
    )
    assert made.text("IPv4: shop/web on node-1.") == f"IPv4: {shop}/{web} on {node}."
    assert made.text("on node-1, shop/drop") == f"on {node}, {shop}/{made.name('drop')}"


def test_names_in_metrics_chains_of_other_proxies_and_old_log_lines_are_replaced() -> None:
    made = anonymizer()
    shop, web, gone = made.name("shop"), made.name("web"), made.name("gone")
    metric = 'kproxy_service_connections_total{{namespace="{}",port="http",service="{}"}} 5'
    assert made.text(metric.format("shop", "web")) == metric.format(shop, web)
    assert made.text("goto tcp/shop/web") == f"goto tcp/{shop}/{web}"
    assert made.text("IPv4: Service shop/gone is deleted") == f"IPv4: Service {shop}/{gone} is deleted"


def test_nodes_are_replaced_in_any_spelling() -> None:
    made = anonymizer()
    for text in ("Node-1", "node-1.example.com", "drop.example.com", "DROP.Example.com", "worker7"):
        assert text.lower() not in made.text(f"Linux {text} x86_64").lower()
    assert made.text("-j DROP") == "-j DROP"


def test_other_text_stays() -> None:
    made = anonymizer()
    text = "counter packets 5 ip saddr 10.0.0.0/8 default/kubernetes other/web 10.96.0.1/32 accept"
    assert made.text(text) == text


def test_replacements_are_valid_names_that_depend_on_the_salt() -> None:
    made = anonymizer()
    assert is_subdomain(made.name("shop"))
    assert made.name("shop") == anonymizer().name("shop") != Anonymizer(b"other").name("shop")
    assert made.name("") == ""
