"""Select the rules of one Service from a dump."""

from __future__ import annotations

SERVICE_CHAINS = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-")


def rules_of(dump: str, service: str) -> list[list[str]]:
    """Return the rules of one Service (`namespace/name`) from the output of iptables-save, one list per chain.

    The first list contains its rules in KUBE-SERVICES, the others the per-Service chains that these rules lead to.
    """
    by_chain: dict[str, list[str]] = {}
    for line in dump.splitlines():
        if line.startswith("-A "):
            by_chain.setdefault(line.split()[1], []).append(line)
    dispatch = [line for line in by_chain.get("KUBE-SERVICES", ()) if f'--comment "{service}' in line]
    selected, queue = [dispatch], _targets(dispatch)
    seen = set(queue)
    for chain in queue:
        rules = by_chain.get(chain, [])
        selected.append(rules)
        new = [target for target in _targets(rules) if target not in seen]
        seen.update(new)
        queue += new
    return [rules for rules in selected if rules]


def _targets(rules: list[str]) -> list[str]:
    targets = [line.split(" -j ")[1].split()[0] for line in rules if " -j " in line]
    return list(dict.fromkeys(target for target in targets if target.startswith(SERVICE_CHAINS)))
