"""Read the output of `nft list ruleset` as the objects that `nft -j list ruleset` prints. Pure.

Only the text's structure is read here; `nft_rules.py` gives it a meaning. A statement that is not understood becomes
`{"unparsed": text}`, and the verdict at the end of its rule stays known if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from msgspec import Struct

Json: TypeAlias = Any
_TOKEN = re.compile(r'"[^"]*"|[{}();,]|[^\s{}();,"]+')
_HANDLE = re.compile(r"\s*# handle (\d+)\s*$")
_VERDICTS = {"accept", "drop", "return", "continue"}
_BLOCKS = {"chain", "set", "map", "flowtable", "ct", "counter", "limit", "quota", "secmark", "synproxy"}
_HEADERS = {"ip", "ip6", "tcp", "udp", "sctp", "th", "dccp", "udplite", "icmp", "icmpv6", "ether", "vlan", "arp", "ah",
            "esp", "comp", "gre", "geneve", "vxlan"}  # fmt: skip
_BARE_META = {"iif", "oif", "iifname", "oifname", "mark", "skuid", "skgid", "iiftype", "oiftype", "nftrace", "cgroup",
              "pkttype", "cpu", "iifgroup", "oifgroup", "l4proto", "protocol", "nfproto", "time", "day", "hour",
              "iifkind", "oifkind", "ibrname", "obrname", "priority", "secmark"}  # fmt: skip
_OPERATORS = {"==", "!=", "<", ">", "<=", ">=", "eq", "ne", "lt", "gt", "le", "ge"}
_OPERATOR_NAMES = {"eq": "==", "ne": "!=", "lt": "<", "gt": ">", "le": "<=", "ge": ">="}
_BINARY = {"&": "&", "|": "|", "^": "^", "and": "&", "or": "|", "xor": "^", "<<": "<<", ">>": ">>", "lshift": "<<"}
_ADDRESS_FIELDS = {"saddr", "daddr", "sport", "dport"}
_NAT_FLAGS = {"random", "fully-random", "persistent"}


class _SyntaxError(ValueError):
    """The text is not understood."""


class _NftLine(Struct):
    """A logical line: its text without the handle, and the handle (0 if it has none)."""

    text: str
    handle: int


def is_nft_text(text: str) -> bool:
    """Return whether a text looks like the output of `nft list ruleset` or `nft list table`."""
    return bool(re.search(r"^table (?:(?:ip|ip6|inet|arp|bridge|netdev) )?\S+ \{", text, re.MULTILINE))


def read_nft_text(text: str) -> list[Json]:
    """Return the objects of a ruleset in the form of libnftables-json(5), with the text of each rule added."""
    objects: list[Json] = []
    lines = _lines(text)
    managed = False
    for line in lines:
        if line.text.startswith("#"):
            managed = "managed by iptables-nft" in line.text
            continue
        words = _words(line.text)
        if words[:1] == ["table"]:
            family, name = (words[1], words[2]) if len(words) > 3 else ("ip", words[1])
            table = {"family": family, "name": name, "handle": line.handle, "managed": managed}
            objects.append({"table": table})
            objects.extend(_table(table, lines))
        managed = False
    return objects


def _lines(text: str) -> Iterator[_NftLine]:
    """Yield the logical lines: a line with an unclosed brace continues, unless it begins a block."""
    parts: list[str] = []
    depth = 0
    for raw in text.splitlines():
        found = _HANDLE.search(raw)
        line = (raw[: found.start()] if found else raw).strip()
        if not line:
            continue
        if line.startswith("#") and not parts:
            yield _NftLine(line, 0)
            continue
        bare = re.sub(r'"[^"]*"', "", line)
        parts.append(line)
        depth += bare.count("{") - bare.count("}")
        if depth <= 0 or (len(parts) == 1 and line.endswith("{") and "=" not in bare):
            yield _NftLine(" ".join(parts), int(found[1]) if found else 0)
            parts, depth = [], 0
    if parts:
        yield _NftLine(" ".join(parts), 0)


def _words(line: str) -> list[str]:
    return _TOKEN.findall(line)


def _table(table: dict[str, Json], lines: Iterator[_NftLine]) -> Iterator[Json]:
    for line in lines:
        if line.text == "}":
            return
        words = _words(line.text)
        if words[0] == "flags":
            table["flags"] = words[1:]
        if words[0] not in _BLOCKS or words[-1] != "{":
            continue
        place = {"family": table["family"], "table": table["name"]}
        name = words[-2]
        if words[0] == "chain":
            yield from _chain(place, name, line.handle, lines)
        else:
            yield from _set(place, words[0], name, line.handle, lines)


def _set(place: dict[str, str], kind: str, name: str, handle: int, lines: Iterator[_NftLine]) -> Iterator[Json]:
    found: dict[str, Json] = {**place, "name": name, "handle": handle, "elem": []}
    for line in lines:
        if line.text == "}":
            break
        tokens = _Tokens(line.text)
        if tokens.accept("elements", "="):
            try:
                found["elem"] = tokens.elements(values=kind == "map")
            except (ValueError, IndexError):
                found["elem"], found["unparsed"] = [], line.text
        elif tokens.accept("flags"):
            found["flags"] = [token for token in tokens.rest() if token not in (",", ";")]
        elif tokens.accept("comment"):
            found["comment"] = tokens.next().strip('"')
    if kind in ("set", "map"):
        yield {kind: found}


def _chain(place: dict[str, str], name: str, handle: int, lines: Iterator[_NftLine]) -> Iterator[Json]:
    chain: dict[str, Json] = {**place, "name": name, "handle": handle}
    rules: list[Json] = []
    for line in lines:
        if line.text == "}":
            break
        tokens = _Tokens(line.text)
        if not rules and tokens.at("type"):
            chain |= _base(line.text)
        elif not rules and tokens.at("comment"):
            chain["comment"] = tokens.rest()[1].strip('"')
        elif not rules and line.text.startswith("policy"):
            chain["policy"] = tokens.rest()[1]
        else:
            rules.append({"rule": {**place, "chain": name, "handle": line.handle, **_rule(line.text)}})
    yield {"chain": chain}
    yield from rules


def _base(text: str) -> dict[str, Json]:
    found = re.match(r'type (\w+) hook (\w+)(?: devices? = \{([^}]*)\}| device "?([^" ]+)"?)? priority ([^;]+)', text)
    if not found:
        return {"type": "unparsed", "hook": "", "prio": 0}
    policy = re.search(r"policy (\w+)", text)
    device = found[4] or (found[3] or "").replace('"', "").strip()
    return {
        "type": found[1],
        "hook": found[2],
        "prio": found[5].strip(),
        "policy": policy[1] if policy else "accept",
        **({"dev": [each.strip() for each in device.split(",")]} if device else {}),
    }


def _rule(text: str) -> dict[str, Json]:
    tokens = _Tokens(text)
    statements, comment = tokens.statements()
    found: dict[str, Json] = {"expr": statements, "text": text}
    if comment:
        found["comment"] = comment
    return found


class _Tokens:
    """Reads the tokens of a line."""

    def __init__(self, text: str) -> None:
        self._tokens = _words(text)
        self._index = 0

    def __bool__(self) -> bool:
        return self._index < len(self._tokens)

    def at(self, *words: str) -> bool:
        return tuple(self._tokens[self._index : self._index + len(words)]) == words

    def peek(self) -> str:
        return self._tokens[self._index] if self else ""

    def accept(self, *words: str) -> bool:
        if self.at(*words):
            self._index += len(words)
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise _SyntaxError(word)

    def next(self) -> str:
        if not self:
            raise _SyntaxError("end of line")
        self._index += 1
        return self._tokens[self._index - 1]

    def rest(self) -> list[str]:
        """Return the remaining tokens."""
        found = self._tokens[self._index :]
        self._index = len(self._tokens)
        return found

    def statements(self) -> tuple[list[Json], str]:
        """Read all statements of a rule. Return them and the rule's comment."""
        found: list[Json] = []
        while self:
            if self.at("comment"):
                self.next()
                return found, self.next().strip('"')
            start = self._index
            try:
                found.append(self.statement())
            except (ValueError, IndexError):
                self._index = start
                comment = self._unparsed(found)
                return found, comment
        return found, ""

    def _unparsed(self, found: list[Json]) -> str:
        """Keep what is not understood as text, with the verdict at the end of the rule, and return the comment."""
        words = self.rest()
        comment = ""
        if len(words) > 1 and words[-2] == "comment":
            comment = words[-1].strip('"')
            words = words[:-2]
        tail = _tail_verdict(words)
        kept = words[: len(words) - (0 if tail is None else tail[1])]
        found.append({"unparsed": " ".join(kept), "known_verdict": tail is not None})
        if tail is not None:
            found.append(tail[0])
        return comment

    # Statements.

    def statement(self) -> Json:
        """Read one statement."""
        word = self.peek()
        if word in _VERDICTS:
            return {self.next(): None}
        if word in ("jump", "goto"):
            return {self.next(): {"target": self.next()}}
        method = getattr(self, f"_statement_{word.replace('-', '_')}", None)
        if method is not None:
            self.next()
            return method()
        return self._relation()

    def _statement_counter(self) -> Json:
        if self.accept("packets"):
            self.next()
            self.expect("bytes")
            self.next()
        elif self.accept("name"):
            self.next()
        return {"counter": None}

    def _statement_log(self) -> Json:
        names = ("prefix", "level", "group", "snaplen", "queue-threshold", "flags")
        while self.peek() in names:
            name = self.next()
            self.next()
            while name == "flags" and self.accept(","):
                self.next()
            if name == "flags" and self.peek() in ("sequence", "options", "uid", "ether"):
                self.next()
                while self.accept(","):
                    self.next()
        return {"log": None}

    def _statement_limit(self) -> Json:
        words = []
        while self.peek() and (
            self.peek() in ("rate", "over", "burst", "packets", "bytes", "name", "kbytes", "mbytes")
            or re.match(r"\d", self.peek())
            or "/" in self.peek()
        ):
            words.append(self.next())
        return {"limit": " ".join(words)}

    def _statement_quota(self) -> Json:
        words = []
        while self.peek() in ("over", "until", "used", "name", "bytes", "kbytes", "mbytes") or self.peek().isdecimal():
            words.append(self.next())
        return {"quota": " ".join(words)}

    def _statement_last(self) -> Json:
        while self.peek() in ("used", "never") or re.match(r"\d", self.peek()):
            self.next()
        return {"last": None}

    def _statement_reject(self) -> Json:
        if not self.accept("with"):
            return {"reject": None}
        if self.accept("tcp", "reset"):
            return {"reject": {"type": "tcp reset"}}
        kind = self.next()
        self.accept("type")
        return {"reject": {"type": kind, "expr": self.next()}}

    def _statement_masquerade(self) -> Json:
        if self.accept("to"):
            self.next()
        self._nat_flags()
        return {"masquerade": None}

    def _statement_redirect(self) -> Json:
        port: Json = None
        if self.accept("to"):
            word = self.next()
            port = word.removeprefix(":") if word != ":" else self.next()
        self._nat_flags()
        return {"redirect": {"port": port}}

    def _statement_dnat(self) -> Json:
        return {"dnat": self._nat()}

    def _statement_snat(self) -> Json:
        return {"snat": self._nat()}

    def _nat(self) -> Json:
        family = self.next() if self.peek() in ("ip", "ip6") else ""
        self.accept("prefix")
        if self.accept("addr"):
            self.expect(".")
            self.expect("port")
        self.expect("to")
        found: dict[str, Json] = {"family": family} if family else {}
        word = self.peek()
        if socket := re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::([\d-]+))?|(\d+\.\d+\.\d+\.\d+)(?::([\d-]+))?", word):
            self.next()
            found["addr"] = socket[1] or socket[3]
            port = socket[2] or socket[4]
            if port:
                found["port"] = int(port) if port.isdecimal() else {"range": port.split("-")}
        elif re.fullmatch(r":\d+", word):
            found["port"] = int(self.next()[1:])
        else:
            found["addr"] = self._mapped()
            if self.accept(":"):
                found["port"] = self._mapped()
            elif re.fullmatch(r":\d+", self.peek()):
                found["port"] = int(self.next()[1:])
        self._nat_flags()
        return found

    def _nat_flags(self) -> None:
        while self.peek() in _NAT_FLAGS or (self.at(",") and self._tokens[self._index + 1] in _NAT_FLAGS):
            self.next()

    def _statement_notrack(self) -> Json:
        return {"notrack": None}

    def _statement_queue(self) -> Json:
        self.rest_of_statement()
        return {"queue": None}

    def _statement_tproxy(self) -> Json:
        self.rest_of_statement()
        return {"tproxy": None}

    def _statement_synproxy(self) -> Json:
        self.rest_of_statement()
        return {"synproxy": None}

    def rest_of_statement(self) -> None:
        """Skip up to the comment."""
        while self and not self.at("comment"):
            self.next()

    def _statement_dup(self) -> Json:
        self.expect("to")
        self.next()
        if self.accept("device"):
            self.next()
        return {"dup": None}

    def _statement_flow(self) -> Json:
        self.next()
        self.next()
        return {"flow": None}

    def _statement_add(self) -> Json:
        return self._update("add")

    def _statement_update(self) -> Json:
        return self._update("update")

    def _statement_delete(self) -> Json:
        return self._update("delete")

    def _update(self, operation: str) -> Json:
        name = self.next()
        self.expect("{")
        key = self._concatenation()
        more: list[str] = []
        depth = 1
        while depth:
            word = self.next()
            depth += {"{": 1, "}": -1}.get(word, 0)
            more.append(word)
        limited = any(word in ("limit", "ct", "quota") for word in more)
        return {"set": {"op": operation, "elem": key, "set": name, **({"limited": True} if limited else {})}}

    def _statement_xt(self) -> Json:
        return {"xt": {"type": self.next(), "name": self.next().strip('"')}}

    # Relations.

    def _relation(self) -> Json:
        left = self._concatenation()
        if self.accept("set"):
            return {"mangle": {"key": left, "value": self._mapped()}}
        if self.accept("vmap"):
            data = self.next() if self.peek().startswith("@") else {"set": self.elements(values=True)}
            return {"vmap": {"key": left, "data": data}}
        if "ct count" in left:
            return left
        operator = self.next() if self.peek() in _OPERATORS else "in"
        operator = _OPERATOR_NAMES.get(operator, operator)
        if operator == "in" and not self:
            raise _SyntaxError("no right-hand side")
        right = self._right()
        if self.accept("/"):  # tcp flags syn / fin,syn,rst,ack
            mask = self._right()
            left, operator = {"&": [left, mask]}, "==" if operator == "in" else operator
        return {"match": {"op": operator, "left": left, "right": right}}

    def _mapped(self) -> Json:
        """Read an expression, or the lookup of an expression in a map."""
        key = self._concatenation(right=True)
        if not self.accept("map"):
            return key
        data = self.next() if self.peek().startswith("@") else {"set": self.elements(values=True)}
        return {"map": {"key": key, "data": data}}

    def _concatenation(self, *, right: bool = False) -> Json:
        parts = [self._binary(right=right)]
        while self.accept("."):
            parts.append(self._binary(right=right))
        return parts[0] if len(parts) == 1 else {"concat": parts}

    def _binary(self, *, right: bool = False) -> Json:
        left = self._primary(right=right)
        while self.peek() in _BINARY:
            operator = _BINARY[self.next()]
            left = {operator: [left, self._primary(right=True)]}
        return left

    def _primary(self, *, right: bool) -> Json:  # noqa: PLR0911
        if self.accept("("):
            inner = self._binary(right=True)
            self.expect(")")
            return inner
        word = self.next()
        if word == "meta":
            return {"meta": {"key": self.next()}}
        if word in ("ct", "fib", "numgen", "jhash", "symhash", "rt", "socket", "osf", "exthdr"):
            return getattr(self, f"_expression_{word}")()
        if word == "tcp" and self.accept("option"):
            return {"tcp option": {"name": self.next(), "field": self.next()}}
        if word in _HEADERS and (self.peek() in _ADDRESS_FIELDS if right else re.match(r"[a-z]", self.peek())):
            return {"payload": {"protocol": word, "field": self.next()}}
        if word in ("@ll", "@nh", "@th"):
            base, offset, length = word[1:], self._raw_number(), self._raw_number()
            return {"payload": {"base": base, "offset": offset, "len": length}}
        if word in _BARE_META and not right:
            return {"meta": {"key": word}}
        if word == "mark":
            return {"meta": {"key": word}}
        if right:
            return _literal(word)
        raise _SyntaxError(word)

    def _raw_number(self) -> int:
        self.expect(",")
        word = self.next()
        if not word.isdecimal():
            raise _SyntaxError(word)
        return int(word)

    def _expression_ct(self) -> Json:
        direction = self.next() if self.peek() in ("original", "reply") else ""
        key = self.next()
        if key in ("ip", "ip6"):
            key = f"{key} {self.next()}"
        if key == "count":
            words = [self.next()]
            if words[0] == "over":
                words.append(self.next())
            return {"ct count": " ".join(words)}
        return {"ct": {"key": key, **({"dir": direction} if direction else {})}}

    def _expression_fib(self) -> Json:
        flags = [self.next()]
        while self.accept("."):
            flags.append(self.next())
        return {"fib": {"flags": flags, "result": self.next()}}

    def _expression_numgen(self) -> Json:
        mode = self.next()
        self.expect("mod")
        found = {"mode": mode, "mod": int(self.next()), "offset": 0}
        if self.accept("offset"):
            found["offset"] = int(self.next())
        return {"numgen": found}

    def _expression_jhash(self) -> Json:
        key = self._concatenation()
        return {"jhash": {"expr": key, **self._modulus()}}

    def _expression_symhash(self) -> Json:
        return {"symhash": self._modulus()}

    def _modulus(self) -> dict[str, int]:
        self.expect("mod")
        found = {"mod": int(self.next())}
        while self.peek() in ("seed", "offset"):
            found[self.next()] = int(self.next(), 0)
        return found

    def _expression_rt(self) -> Json:
        return {"rt": {"key": self.next()}}

    def _expression_socket(self) -> Json:
        key = self.next()
        if key == "cgroupv2":
            self.expect("level")
            self.next()
        return {"socket": {"key": key}}

    def _expression_osf(self) -> Json:
        return {"osf": {"key": self.next()}}

    def _expression_exthdr(self) -> Json:
        return {"exthdr": {"name": self.next()}}

    # Right-hand sides and elements.

    def _right(self) -> Json:
        if self.at("{"):
            return {"set": self.elements(values=False)}
        first = self._concatenation(right=True)
        if not self.at(","):
            return first
        values = [first]
        while self.accept(","):
            values.append(self._concatenation(right=True))
        return values

    def elements(self, *, values: bool) -> list[Json]:
        """Read the elements of a set or map in braces."""
        self.expect("{")
        found: list[Json] = []
        while not self.accept("}"):
            found.append(self._element(values=values))
            if not self.at("}"):
                self.expect(",")
        return found

    def _element(self, *, values: bool) -> Json:
        key = self._concatenation(right=True)
        properties: dict[str, Json] = {}
        limited = False
        while self and self.peek() not in (",", "}", ":"):
            word = self.next()
            if word in ("timeout", "expires"):
                properties[word] = self.next()
            elif word == "comment":
                properties["comment"] = self.next().strip('"')
            elif word == "counter":
                self._statement_counter()
            else:
                limited = True
        wrapped = {"elem": {"val": key, **properties}} if properties or limited else key
        if limited:
            wrapped["elem"]["limited"] = True
        if not values:
            return wrapped
        self.expect(":")
        return [wrapped, self._value()]

    def _value(self) -> Json:
        word = self.peek()
        if word in _VERDICTS:
            return {self.next(): None}
        if word in ("jump", "goto"):
            return {self.next(): {"target": self.next()}}
        return self._concatenation(right=True)


def _literal(word: str) -> Json:
    """Return a constant of the right-hand side: a string, number, prefix or range."""
    if word.startswith('"'):
        return word[1:-1]
    if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", word):
        return int(word, 0)
    if found := re.fullmatch(r"([0-9a-fA-F:.]+)/(\d+)", word):
        return {"prefix": {"addr": found[1], "len": int(found[2])}}
    if found := re.fullmatch(r"(\d+|0x[0-9a-fA-F]+)-(\d+|0x[0-9a-fA-F]+)", word):
        return {"range": [int(found[1], 0), int(found[2], 0)]}
    if found := re.fullmatch(r"([0-9a-fA-F:.]+)-([0-9a-fA-F:.]+)", word):
        return {"range": [found[1], found[2]]}
    if word in "{}();,":
        raise _SyntaxError(word)
    return word


def _tail_verdict(words: list[str]) -> tuple[Json, int] | None:
    """Return the verdict at the end of a rule and the number of its words, or None."""
    if words and words[-1] in _VERDICTS:
        return {words[-1]: None}, 1
    if len(words) > 1 and words[-2] in ("jump", "goto"):
        return {words[-2]: {"target": words[-1]}}, 2
    if words and words[-1] == "reject":
        return {"reject": None}, 1
    return None
