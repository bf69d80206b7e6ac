"""Recognize service proxies among processes. Pure."""

from __future__ import annotations

from kproxy.host.observed import ObservedProcess

PROXIES = {
    "kube-proxy": "kube-proxy",
    "kubelite": "kubelite of MicroK8s, which contains kube-proxy",
    "k3s": "K3s, which contains kube-proxy unless it was started with --disable-kube-proxy",
    "k3s-server": "K3s, which contains kube-proxy unless it was started with --disable-kube-proxy",
    "k3s-agent": "K3s, which contains kube-proxy unless it was started with --disable-kube-proxy",
    "kube-router": "kube-router's service proxy",
    "cilium-agent": "Cilium",
    "calico-node": "Calico",
}
"""Programs that are service proxies, or may be, by name."""
CERTAIN = {"kube-proxy", "kubelite"}
"""Programs that always proxy Services."""


def program(process: ObservedProcess) -> str:
    """Return the name of the program that a process runs, without its folder."""
    return process.argv[0].split(" ", 1)[0].rpartition("/")[2] if process.argv else process.name


def may_proxy(process: ObservedProcess) -> bool:
    """Return whether a process may program Services for a proxy other than kproxy."""
    return known_name(process) != ""


def known_name(process: ObservedProcess) -> str:
    """Return the key of `PROXIES` for a process, or "" for other programs. hyperkube is named after its command."""
    name = program(process)
    if name == "hyperkube" and len(process.argv) > 1 and process.argv[1] in {"proxy", "kube-proxy"}:
        return "kube-proxy"
    return next((each for each in (name, process.name) if each in PROXIES), "")


def is_kproxy(process: ObservedProcess) -> bool:
    """Return whether a process is a kproxy daemon."""
    words = process.argv
    for position, word in enumerate(words[:6]):
        if word.rpartition("/")[2] == "kproxy" and words[position + 1 : position + 2] == ("run",):
            return "--cleanup" not in words and "--init-only" not in words
    return False
