"""Write the rules of `nft -j list ruleset` in nft's syntax, for people. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Json: TypeAlias = Any
_SHOWN_ELEMENTS = 8
"""Maximum number of elements of an anonymous set or map that are shown."""


def rule_text(statements: list[Json], comment: str = "") -> str:
    """Return a rule as one line."""
    parts = [statement_text(statement) for statement in statements]
    if comment:
        parts.append(f'comment "{comment}"')
    return " ".join(part for part in parts if part)


def statement_text(statement: Json) -> str:
    """Return a statement as text."""
    ((kind, content),) = list(statement.items())[:1]
    write = _STATEMENTS.get(kind)
    return write(content) if write else str(kind)


def _match_text(content: Json) -> str:
    operator = content.get("op", "in")
    shown = "" if operator in ("in", "==") and not _is_binary(content["left"]) else f"{operator} "
    return f"{expression_text(content['left'])} {'== ' if shown == 'in ' else shown}{expression_text(content['right'])}"


def _xt_text(content: Json) -> str:
    return f'xt {content["type"]} "{content["name"]}"' if content else "xt (a match or target of iptables)"


def _rate_text(kind: str, content: Json) -> str:
    return f"{kind} {content}" if isinstance(content, str) else f"{kind} {_limit_text(content)}"


def _limit_text(content: Json) -> str:
    return f"rate {content['rate']}/{content['per']}" if isinstance(content, dict) and "rate" in content else ""


def _reject_text(content: Json) -> str:
    if not content:
        return "reject"
    return f"reject with {content['type']}" + (f" {content['expr']}" if "expr" in content else "")


def _nat_text(kind: str, content: Json) -> str:
    family = f" {content['family']}" if content.get("family") else ""
    address = expression_text(content["addr"]) if "addr" in content else ""
    port = f":{expression_text(content['port'])}" if "port" in content else ""
    return f"{kind}{family} to {address}{port}"


def _is_binary(expression: Json) -> bool:
    return isinstance(expression, dict) and any(key in expression for key in ("&", "|", "^"))


def expression_text(expression: Json) -> str:
    """Return an expression or a constant as text."""
    if isinstance(expression, list):
        return ",".join(map(expression_text, expression))
    if not isinstance(expression, dict):
        return str(expression)
    ((kind, content),) = list(expression.items())[:1]
    if kind in ("&", "|", "^", "<<", ">>"):
        return f" {kind} ".join(map(expression_text, content))
    write = _EXPRESSIONS.get(kind)
    return write(content) if write else str(kind)


def _payload_text(content: Json) -> str:
    if "base" in content:
        return f"@{content['base']},{content['offset']},{content['len']}"
    return f"{content['protocol']} {content['field']}"


def _meta_text(content: Json) -> str:
    bare = content["key"] in ("iifname", "oifname", "iif", "oif", "pkttype", "skuid", "skgid")
    return f"{content['key']}" if bare else f"meta {content['key']}"


def _fib_text(content: Json) -> str:
    flags = content["flags"]
    return f"fib {flags if isinstance(flags, str) else ' . '.join(flags)} {content['result']}"


def _numgen_text(content: Json) -> str:
    offset = f" offset {content['offset']}" if content.get("offset") else ""
    return f"numgen {content['mode']} mod {content['mod']}{offset}"


def _set_text(elements: Json) -> str:
    listed = elements if isinstance(elements, list) else [elements]
    shown = [
        f"{expression_text(each[0])} : {expression_text(each[1])}" if isinstance(each, list) else expression_text(each)
        for each in listed[:_SHOWN_ELEMENTS]
    ]
    more = [f"... {len(listed) - _SHOWN_ELEMENTS} more"] if len(listed) > _SHOWN_ELEMENTS else []
    return f"{{ {', '.join([*shown, *more])} }}"


_EXPRESSIONS: dict[str, Callable[[Json], str]] = {
    "concat": lambda content: " . ".join(map(expression_text, content)),
    "payload": _payload_text,
    "meta": _meta_text,
    "ct": lambda content: " ".join(each for each in ("ct", content.get("dir", ""), content["key"]) if each),
    "fib": _fib_text,
    "numgen": _numgen_text,
    "prefix": lambda content: f"{expression_text(content['addr'])}/{content['len']}",
    "range": lambda content: "-".join(map(expression_text, content)),
    "map": lambda content: f"{expression_text(content['key'])} map {expression_text(content['data'])}",
    "set": _set_text,
    "elem": lambda content: expression_text(content["val"]),
    "jump": lambda content: f"jump {content['target']}",
    "goto": lambda content: f"goto {content['target']}",
}
_STATEMENTS: dict[str, Callable[[Json], str]] = {
    "unparsed": str,
    "match": _match_text,
    "vmap": lambda content: f"{expression_text(content['key'])} vmap {expression_text(content['data'])}",
    "mangle": lambda content: f"{expression_text(content['key'])} set {expression_text(content['value'])}",
    "jump": lambda content: f"jump {content['target']}",
    "goto": lambda content: f"goto {content['target']}",
    "dnat": lambda content: _nat_text("dnat", content),
    "snat": lambda content: _nat_text("snat", content),
    "set": lambda content: (
        f"{content['op']} @{content['set'].removeprefix('@')} {{ {expression_text(content['elem'])} }}"
    ),
    "reject": lambda content: _reject_text(content or {}),
    "xt": _xt_text,
    "limit": lambda content: _rate_text("limit", content),
    "quota": lambda content: _rate_text("quota", content),
    "ct count": lambda content: _rate_text("ct count", content),
    "redirect": lambda content: f"redirect to :{content['port']}" if content and content.get("port") else "redirect",
}
