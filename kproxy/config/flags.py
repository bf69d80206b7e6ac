"""kube-proxy's flags: add them to a parser, apply their values to a configuration, and list their values.

There are two differences from kube-proxy. First, flags always override the configuration file; kube-proxy ignores most
flags if `--config` is set. Second, kube-proxy does not have the flag `--strict-config`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from typing import Any

from kproxy.config.decode import ConfigError, decode, encode, must_be
from kproxy.config.flag_table import CONFIG_FLAGS, GROUPS, PORT_FLAGS, UNSUPPORTED, Flag, Group
from kproxy.config.load import load_config
from kproxy.config.types import Config
from kproxy.config.validation import check, gate_warnings, has_port, reject_retired_mode
from kproxy.documents.document import FieldPath, field_path_text
from kproxy.model.printable_text import printable

_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}
_REPEATABLE = {"list", "gates", "vmodule"}
_GROUP_DESCRIPTIONS: dict[Group, str] = {"no effect": "Accepted for compatibility with kube-proxy."}
_EXTRA_FLAGS: dict[Group, tuple[tuple[str, str, str], ...]] = {
    "configuration": (("config", "FILE", "kube-proxy configuration file; flags override its values"),),
    "API server": (("master", "URL", "address of the API server; overrides the kubeconfig"),),
}
"""Flags that set no configuration field, by group: their names, metavars and help texts."""
_ACTIONS = ("cleanup", "init_only")
_PATHS = ("config", "master", "objects", "write_config_to")


def add_flags(parser: argparse.ArgumentParser, *, once: bool = False, hidden: Collection[Group] = ()) -> None:
    """Add kube-proxy's flags to a parser, in groups. Flags of `hidden` groups are accepted, but the help omits them.

    `once` is true for commands that run once, such as `kproxy apply`. Their parsers do not get the flags
    `--write-config-to`, `--cleanup` and `--init-only`.

    In the parsed namespace, the flags of `flag_table.py` (such as `proxy_mode`) are present only if the command line
    sets them. The other flags that were added are always present. `config`, `master` and `write_config_to` are None by
    default; `strict_config`, `cleanup` and `init_only` are False by default.

    Create the parser with `allow_abbrev=False`, because kube-proxy does not accept abbreviated flags.
    """
    if not once:
        _add_actions(parser.add_argument_group("actions"))
    for title, flags in GROUPS.items():
        hide = {"help": argparse.SUPPRESS} if title in hidden else {}
        group = parser.add_argument_group(title, None if hide else _GROUP_DESCRIPTIONS.get(title))
        for name, metavar, text in _EXTRA_FLAGS.get(title, ()):
            _add(group, name, **{"metavar": metavar, "help": text, "default": None, **hide})
        if title == "configuration":
            _add_switch(
                group,
                "strict-config",
                "exit if the file has unknown fields, duplicate keys or additional documents (default: false)",
            )
        for flag in flags:
            options = {"metavar": flag.metavar, "help": flag.help or None, "default": argparse.SUPPRESS, **hide}
            if flag.kind == "bool":
                options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif flag.kind in _REPEATABLE:
                options |= {"action": "append"}
            _add(group, flag.name, **options)


def configure(namespace: argparse.Namespace, content: bytes | None = None) -> tuple[Config, list[str]]:
    """Return the configuration that a command line specifies, and one-line warnings.

    `content` is the content of the `--config` file. If `content` is None, the file is read. Raises `ConfigError`.
    """
    config = Config()
    warnings: list[str] = []
    if namespace.config is not None:
        text = _read_file(namespace.config) if content is None else content
        config, warnings = load_config(text, namespace.config, strict=namespace.strict_config)
    config, flag_warnings = apply_flags(config, namespace)
    return config, warnings + flag_warnings


def apply_flags(config: Config, namespace: argparse.Namespace) -> tuple[Config, list[str]]:
    """Return a copy of `config` with the command line's flags applied, and one-line warnings.

    Raises `ConfigError` if a flag or the resulting configuration is invalid.
    """
    given = list(_given(namespace, CONFIG_FLAGS))
    ports = list(_given(namespace, PORT_FLAGS))
    if not given and not ports:
        return config, []
    data = encode(config)
    set_by: dict[FieldPath, str] = {}
    for flag, raw in given:
        for field in flag.fields:
            path = tuple(field.split("."))
            set_by[path] = flag.option
            _set_field(data, path, _PARSERS[flag.kind](raw, flag.option))
    for flag, raw in ports:
        set_by.setdefault(flag.fields, flag.option)
        _add_port(data, flag.fields[0], _integer(raw, flag.option), flag.option)

    def locate(path: FieldPath) -> str:
        lengths = range(len(path), 0, -1)
        return next((set_by[path[:length]] for length in lengths if path[:length] in set_by), field_path_text(path))

    reject_retired_mode(data["mode"], locate)
    return check(decode(Config, data, locate), locate), _warnings(given, ports)


def flag_values(config: Config, namespace: argparse.Namespace) -> dict[str, str]:
    """Return the values of the flags of `kproxy run` by flag name, in the format of Go's pflag package.

    `config` is the configuration that results from the parsed command line `namespace`. As in kube-proxy, a flag that
    the command line does not set has its default value, even if the configuration file sets the same field.
    `--strict-config`, which kube-proxy does not have, is omitted.
    """
    given, default = encode(config), encode(Config())
    values = {flag.name: _flag_value(given if _is_given(namespace, flag) else default, flag) for flag in CONFIG_FLAGS}
    values |= {flag.name: _port_value(namespace, flag, default) for flag in PORT_FLAGS}
    values |= {_flag_name(name): getattr(namespace, name, None) or "" for name in _PATHS}
    values |= {_flag_name(name): _pflag_text(bool(getattr(namespace, name, False))) for name in _ACTIONS}
    for flag in CONFIG_FLAGS:
        if not flag.fields:
            values[flag.name] = getattr(namespace, _attribute(flag.name), "")
    return dict(sorted(values.items()))


# Adding flags to a parser


def _add_actions(group: Any) -> None:
    text = "write the effective configuration to a file and exit"
    _add(group, "write-config-to", metavar="FILE", help=text, default=None)
    _add_switch(
        group,
        "cleanup",
        "remove the rules of kproxy and kube-proxy in all modes, except the chain KUBE-FIREWALL, and exit",
    )
    _add_switch(group, "init-only", "set the kernel parameters that require root and exit")


def _add_switch(group: Any, name: str, text: str) -> None:
    """Add a boolean flag that sets no configuration field."""
    _add(group, name, metavar="BOOL", nargs="?", const=True, type=_switch, default=False, help=text)


def _add(group: Any, name: str, **options: Any) -> None:
    """Add a flag in two spellings, as in kube-proxy: with dashes and with underscores.

    The help lists only the spelling with dashes.
    """
    dest = _attribute(name)
    group.add_argument(*(["-v"] if name == "v" else []), f"--{name}", dest=dest, **options)
    if "-" in name:
        group.add_argument(f"--{dest}", dest=dest, **{**options, "help": argparse.SUPPRESS})


def _switch(raw: str) -> bool:
    if raw in _TRUE | _FALSE:
        return raw in _TRUE
    raise argparse.ArgumentTypeError(f"must be true or false, not {raw!r}")


def _attribute(flag_name: str) -> str:
    return flag_name.replace("-", "_")


def _flag_name(attribute: str) -> str:
    return attribute.replace("_", "-")


# Applying flags


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{printable(path)}: cannot be read: {reason}") from None


def _given(namespace: argparse.Namespace, flags: tuple[Flag, ...]) -> Iterator[tuple[Flag, Any]]:
    for flag in flags:
        raw = getattr(namespace, _attribute(flag.name), None)
        if raw is not None and not (raw == "" and flag.empty_is_unset):
            yield flag, raw


def _set_field(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a configuration field to the value of a flag.

    Feature gates and vmodule patterns are added to those of the file, and take precedence over them.
    """
    for key in path[:-1]:
        data = data[key]
    if path[-1] == "featureGates":
        value = data[path[-1]] | value
    elif path[-1] == "vmodule":
        value = value + data[path[-1]]
    data[path[-1]] = value


def _add_port(data: dict[str, Any], field: str, port: int, option: str) -> None:
    if not 0 <= port <= 65535:
        raise must_be(option, "a port from 1 to 65535, or 0 to disable the server", port)
    address = data[field]
    if port == 0:
        data[field] = ""
    elif not has_port(address):
        data[field] = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _warnings(given: list[tuple[Flag, Any]], ports: list[tuple[Flag, Any]]) -> list[str]:
    unsupported = [flag.option for flag, _ in given if flag in UNSUPPORTED]
    gates = [_gates(raw, flag.option) for flag, raw in given if flag.kind == "gates"]
    return [
        *([f"{', '.join(unsupported)}: no effect in kproxy"] if unsupported else []),
        *(f"{flag.option}: {flag.help}" for flag, _ in ports),
        *(line for values in gates for line in gate_warnings(values, "--feature-gates")),
    ]


def _text(raw: str, option: str) -> str:
    if option == "--hostname-override":
        if not raw.strip():
            raise must_be(option, "a host name", raw)
        return raw.strip().lower()
    return raw


def _boolean(raw: str, option: str) -> bool:
    if raw not in _TRUE | _FALSE:
        raise must_be(option, "true or false", raw)
    return raw in _TRUE


def _integer(raw: str, option: str) -> int:
    try:
        return int(raw)
    except ValueError:
        raise must_be(option, "an integer", raw) from None


def _number(raw: str, option: str) -> float:
    try:
        return float(raw)
    except ValueError:
        raise must_be(option, "a number", raw) from None


def _list(raws: list[str], option: str) -> list[str]:
    del option
    return [part for raw in raws for part in raw.split(",") if part]


def _pairs(raws: list[str], option: str, allowed: str) -> Iterator[tuple[str, str]]:
    for part in _list(raws, option):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise must_be(option, allowed, part)
        yield name.strip(), value.strip()


def _gates(raws: list[str], option: str) -> dict[str, bool]:
    pairs = _pairs(raws, option, "NAME=true or NAME=false")
    return {name: _boolean(value, f"{option}: {name}") for name, value in pairs}


def _vmodule(raws: list[str], option: str) -> list[dict[str, Any]]:
    pairs = _pairs(raws, option, "PATTERN=N")
    return [{"filePattern": name, "verbosity": _integer(value, f"{option}: {name}")} for name, value in pairs]


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "text": _text,
    "bool": _boolean,
    "int": _integer,
    "number": _number,
    "list": _list,
    "gates": _gates,
    "vmodule": _vmodule,
}
"""The function that parses the value of each kind of flag. Its second argument is the flag's name, for messages."""


# Listing the values of flags


def _is_given(namespace: argparse.Namespace, flag: Flag) -> bool:
    return getattr(namespace, _attribute(flag.name), None) is not None


def _flag_value(data: Any, flag: Flag) -> str:
    if not flag.fields:
        return ""
    for key in flag.fields[0].split("."):
        data = data[key]
    if flag.kind == "vmodule":
        return ",".join(f"{item['filePattern']}={item['verbosity']}" for item in data)
    return _pflag_text(data)


def _port_value(namespace: argparse.Namespace, flag: Flag, default: Any) -> str:
    port: str = default[flag.fields[0]].rpartition(":")[2]
    return str(getattr(namespace, _attribute(flag.name), port))


def _pflag_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ",".join(f"{name}={_pflag_text(item)}" for name, item in sorted(value.items()))
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
