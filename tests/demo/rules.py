"""Picking one Service's rules out of a whole dump."""

from __future__ import annotations

SERVICE_CHAINS = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-")


def rules_of(dump: str, service: str) -> list[list[str]]:
    """Return the rules of one Service (`namespace/name`) in an iptables-save text, a list for each chain.

    First what KUBE-SERVICES says of it, then every chain of its own that can be reached from there.
    """
    by_chain: dict[str, list[str]] = {}
    for line in dump.splitlines():
        if line.startswith("-A "):
            by_chain.setdefault(line.split()[1], []).append(line)
    entry = [line for line in by_chain.get("KUBE-SERVICES", ()) if f'--comment "{service}' in line]
    found, waiting = [entry], _targets(entry)
    seen = set(waiting)
    for chain in waiting:
        rules = by_chain.get(chain, [])
        found.append(rules)
        new = [target for target in _targets(rules) if target not in seen]
        seen.update(new)
        waiting += new
    return [rules for rules in found if rules]


def _targets(rules: list[str]) -> list[str]:
    targets = [line.split(" -j ")[1].split()[0] for line in rules if " -j " in line]
    return list(dict.fromkeys(target for target in targets if target.startswith(SERVICE_CHAINS)))
