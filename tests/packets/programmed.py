"""The rules that kproxy programs for a recorded cluster, loaded into the simulators."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from kproxy.app.family_contexts import make_context
from kproxy.config import Config
from kproxy.config.load import load_config
from kproxy.iptables.backend import IptablesPrinter
from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Replace
from kproxy.model.store import Store
from kproxy.model.types import Family, Node, ServiceCIDR
from kproxy.nftables.backend import NftablesPrinter
from kproxy.simulate.iptables import IptablesSimulator
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.sync.family_sync import FamilySync
from tests.fakekernel import FakeKernel
from tests.packets.senders import NODE_ADDRESSES, SERVICE_CIDRS
from tests.recordings import GOLDEN, replaces, store


def programmed_iptables(scenario: str) -> dict[Family, IptablesSimulator]:
    """Return the rules for the recorded objects and configuration in iptables mode."""
    return {family: IptablesSimulator(text, family) for family, text in iptables_text(scenario).items()}


def programmed_nftables(scenario: str) -> dict[Family, NftablesSimulator]:
    """Return the rules for the recorded objects, configuration and ServiceCIDR in nftables mode."""
    return {family: NftablesSimulator(text, family) for family, text in nftables_text(scenario).items()}


def iptables_text(scenario: str) -> dict[Family, str]:
    """Return the rules in iptables mode as iptables-save prints them."""
    config, texts = _config(scenario), {}
    for family in Family:
        kernel = FakeKernel()
        FamilySync(IptablesPrinter(kernel.restore), partial(_context, config, family)).sync(store(scenario))
        texts[family] = "".join(kernel.dump())
    return texts


def nftables_text(scenario: str) -> dict[Family, str]:
    """Return the commands for `nft -f` that create the table of nftables mode."""
    objects = Store("node-1", (*BASIC_KINDS, ServiceCIDR))
    for delta in (*replaces(scenario), Replace(ServiceCIDR, (ServiceCIDR("kubernetes", SERVICE_CIDRS),))):
        objects.apply(delta)
    config, texts = replace(_config(scenario), mode="nftables"), {}
    for family in Family:
        pages: list[str] = []
        FamilySync(NftablesPrinter(family, pages.append), partial(_context, config, family)).sync(objects)
        texts[family] = "".join(pages)
    return texts


def _config(scenario: str) -> Config:
    path = GOLDEN / scenario / "config.json"
    config, _ = load_config(path.read_bytes(), str(path))
    return config


def _context(config: Config, family: Family, node: Node | None) -> Context:
    addresses = NODE_ADDRESSES.values()
    return make_context(config, family, "node-1", node, addresses, accounting=True, random_fully=True)
