"""The other program: it changes kproxy's rules on a node under names that tell its commits from those of kproxy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kproxy.model.types import Family
from tests.drift_times import victims
from tests.drift_times.damages import Damage, fill
from tests.drift_times.kernel_state import ALL, IptablesState, NftablesState, State
from tests.lab.iptables import PREFIXES
from tests.lab.namespace import Namespace

STRANGER = "stranger"
"""The beginning of the names of the programs that do the damage."""


class Stranger:
    """Damages the rules of one mode on a node, and reads them."""

    def __init__(self, node: Namespace, mode: str, folder: Path, *, remember: bool = False) -> None:
        """`mode` is `nftables`, `iptables-nft` or `iptables-legacy`; `folder` is for links to programs.

        With `remember`, the rules are read only once for `names`, because that takes seconds in a large cluster.
        """
        self._remember = remember
        self._texts: dict[Family, str] = {}
        self._node, self._mode, self._folder = node, mode, folder
        self.variant = "nft" if mode == "nftables" else mode.removeprefix("iptables-")
        folder.mkdir()
        for name, real in ((STRANGER, f"xtables-{self.variant}-multi"), (f"{STRANGER}-nft", "nft")):
            found = shutil.which(real)
            assert found is not None
            (folder / name).symlink_to(os.path.realpath(found))
        self._states = {family: self._state(family) for family in Family}

    def _state(self, family: Family) -> IptablesState | NftablesState:
        if self._mode == "nftables":
            return NftablesState(self._node, family)
        return IptablesState(self._node, family, f"{PREFIXES[family]}-{self.variant}")

    def read(self, family: Family, parts: tuple[str, ...] = ALL) -> State:
        """Return the rules of a family, or some parts of them."""
        return self._states[family].read(parts)

    def names(self, family: Family, number: int) -> dict[str, str]:
        """Return what the names in the commands stand for if the Service with this number is damaged.

        Raises `RuntimeError` if the Service is not programmed.
        """
        text = self._texts.get(family) or self._states[family].text()
        if self._remember:
            self._texts[family] = text
        found = victims.addresses(number, family)
        try:
            found |= (victims.nftables_names if self._mode == "nftables" else victims.iptables_names)(number, text)
        except IndexError:
            raise RuntimeError(f"{victims.name(number)} is not programmed") from None
        prefix, program = PREFIXES[family], self._folder / STRANGER
        found |= {"iptables": f"{program} {prefix}", "restore": f"{program} {prefix}-restore"}
        return found | {"save": f"{program} {prefix}-save", "nft": f"{program}-nft"}

    def run(self, command: str, names: dict[str, str]) -> None:
        """Run a command of a damage. Raises `RuntimeError` if it fails."""
        lock = self._folder.parent / "lock"
        script = f"cd {self._folder}; export XTABLES_LOCKFILE={lock}\n{fill(command, names)}"
        self._node.run(["sh", "-ec", script])

    @staticmethod
    def parts(damage: Damage, names: dict[str, str]) -> tuple[str, ...]:
        """Return the parts that a damage changes."""
        return tuple(fill(part, names) for part in damage.parts)
