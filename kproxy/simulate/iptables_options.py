"""The grammar of one rule as `iptables-save` prints it: tokens to options.

The tables below are all of what a Kubernetes service proxy writes. Any other token is an `UnknownRuleError`,
because a rule that is read half is read wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec import Struct, field

from kproxy.simulate.packet import UnknownRuleError

_BASE = {"-s": 1, "-d": 1, "-i": 1, "-p": 1}
_MODULES = {
    "tcp": {"--dport": 1},
    "udp": {"--dport": 1},
    "sctp": {"--dport": 1},
    "comment": {"--comment": 1},
    "addrtype": {"--dst-type": 1, "--src-type": 1},
    "mark": {"--mark": 1},
    "conntrack": {"--ctstate": 1},
    "statistic": {"--mode": 1, "--probability": 1},
    "recent": {"--rcheck": 0, "--set": 0, "--seconds": 1, "--reap": 0, "--name": 1, "--mask": 1, "--rsource": 0},
    "nfacct": {"--nfacct-name": 1},
}
TARGETS = {
    "ACCEPT": {},
    "DROP": {},
    "RETURN": {},
    "REJECT": {"--reject-with": 1},
    "MARK": {"--set-xmark": 1},
    "MASQUERADE": {"--random-fully": 0},
    "DNAT": {"--to-destination": 1},
}
"""The built-in targets. Like the modules above, with how many arguments each of their options takes."""

_NEGATABLE = frozenset({"-s", "-d", "-i", "--mark", "--ctstate"})
_REQUIRED = {
    "comment": ("--comment",),
    "mark": ("--mark",),
    "conntrack": ("--ctstate",),
    "statistic": ("--mode", "--probability"),
    "recent": ("--name", "--mask", "--rsource"),
    "nfacct": ("--nfacct-name",),
    "-j REJECT": ("--reject-with",),
    "-j MARK": ("--set-xmark",),
    "-j DNAT": ("--to-destination",),
}
_ONLY = {
    "--mode": ("random",),
    "--mask": ("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    "--reject-with": ("icmp-port-unreachable", "icmp6-port-unreachable"),
}
"""Options that are understood with these arguments only."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


class Options(Struct):
    """A rule's options: by name, whether `!` stands before it, and its argument ("" if it takes none)."""

    found: dict[str, tuple[bool, str]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    target: str = ""

    def value(self, name: str) -> str:
        """Return an option's argument, "" if the option is not there."""
        return self.found.get(name, (False, ""))[1]


def read_options(text: str) -> Options:
    """Read what follows `-A CHAIN`. A target that is not built in is taken for a chain."""
    options = Options()
    known = _BASE
    negated = False
    tokens = iter(_TOKEN.findall(text))
    for word in tokens:
        if word == "!" and not negated:
            negated = True
            continue
        if word == "-m" and not negated:
            known = _read_module(options, tokens)
        elif word == "-j" and not negated and not options.target:
            options.target = _argument(word, tokens)
            known = TARGETS.get(options.target, {})
        else:
            _read_option(options, known, word, negated, tokens)
        negated = False
    if negated:
        raise UnknownRuleError("nothing after !")
    _check(options)
    return options


def _read_module(options: Options, tokens: Iterator[str]) -> dict[str, int]:
    module = _argument("-m", tokens)
    if module not in _MODULES:
        raise UnknownRuleError(f"-m {module} is not known")
    if module in options.modules:
        raise UnknownRuleError(f"-m {module} stands twice")
    options.modules.append(module)
    return _MODULES[module]


def _read_option(options: Options, known: dict[str, int], name: str, negated: bool, tokens: Iterator[str]) -> None:
    arguments = known.get(name, _BASE.get(name))
    if arguments is None or (negated and name not in _NEGATABLE):
        raise UnknownRuleError(f"{'! ' if negated else ''}{name} is not known here")
    if name in options.found:
        raise UnknownRuleError(f"{name} stands twice")
    value = _argument(name, tokens) if arguments else ""
    if value not in _ONLY.get(name, (value,)):
        raise UnknownRuleError(f"{name} {value} is not known")
    options.found[name] = (negated, value)


def _argument(name: str, tokens: Iterator[str]) -> str:
    value = next(tokens, None)
    if value is None:
        raise UnknownRuleError(f"{name} lacks its argument")
    return value[1:-1] if value.startswith('"') else value


def _check(options: Options) -> None:
    """Refuse combinations whose parts are known but not what they mean together."""
    found = options.found
    for owner in (*options.modules, f"-j {options.target}"):
        for name in _REQUIRED.get(owner, ()):
            if name not in found:
                raise UnknownRuleError(f"{owner} without {name} is not known")
    for module in options.modules:
        if module in ("tcp", "udp", "sctp") and found.get("-p") != (False, module):
            raise UnknownRuleError(f"-m {module} without -p {module} is not known")
    if "recent" in options.modules:
        if ("--rcheck" in found) == ("--set" in found):
            raise UnknownRuleError("-m recent is known with either --rcheck or --set")
        if "--set" in found and "statistic" in options.modules:
            raise UnknownRuleError("--set by chance is not known")
