"""kube-proxy's command line: flags in Go's syntax, laid over the configuration file.

In kube-proxy most flags are silently ignored once `--config` is given. In kproxy a flag that is given always
wins over the file, and `--strict-config` is its own: these are its deviations from kube-proxy's command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from typing import Any

from kproxy.config.decode import ConfigError, Path, decode, encode, must_be
from kproxy.config.flag_table import CONFIG_FLAGS, GROUPS, PORT_FLAGS, WITHOUT_EFFECT, Flag, Group
from kproxy.config.load import load_config
from kproxy.config.types import Config
from kproxy.config.validation import check, gate_warnings, has_port, refuse_retired_mode
from kproxy.documents.document import field_path_text

_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}
_GATHERED = {"list", "gates", "vmodule"}
_NOTES: dict[Group, str] = {"without effect": "Taken so that a command line for kube-proxy works as it is."}
_NO_FIELDS: dict[Group, tuple[tuple[str, str, str], ...]] = {
    "configuration": (("config", "FILE", "kube-proxy's configuration file; flags win over it"),),
    "what is followed": (("master", "URL", "API server, instead of the kubeconfig's"),),
}


def add_flags(parser: argparse.ArgumentParser, *, once: bool = False, hidden: Collection[Group] = ()) -> None:
    """Give a parser kube-proxy's flags, in groups; those of the `hidden` groups are taken, but not in the help.

    Flags that set fields appear in the namespace (`proxy_mode`) only if they are given. Always there are `config` and
    `master`, None if not given, `strict_config` and, unless the command works `once` only, what it can do instead:
    `write_config_to` (None if not given), `cleanup` and `init_only`. The parser should be made with
    `allow_abbrev=False`: Go knows no abbreviated flags.
    """
    if not once:
        _add_actions(parser.add_argument_group("instead of running"))
    for title, flags in GROUPS.items():
        hide = {"help": argparse.SUPPRESS} if title in hidden else {}
        group = parser.add_argument_group(title, None if hide else _NOTES.get(title))
        for name, value, text in _NO_FIELDS.get(title, ()):
            _add(group, name, **{"metavar": value, "help": text, "default": None, **hide})
        if title == "configuration":
            _add_switch(group, "strict-config", "end if the file has unknown fields or doubled keys (default: false)")
        for flag in flags:
            options = {"metavar": flag.value, "help": flag.help or None, "default": argparse.SUPPRESS, **hide}
            if flag.kind == "bool":
                options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            elif flag.kind in _GATHERED:
                options |= {"action": "append"}
            _add(group, flag.name, **options)


def configure(namespace: argparse.Namespace, content: bytes | None = None) -> tuple[Config, list[str]]:
    """Return the configuration that a command line asks for, and warnings, a line each.

    `content` is what the file behind `--config` holds; without it, the file is read. Raises `ConfigError`.
    """
    config = Config()
    warnings: list[str] = []
    if namespace.config is not None:
        text = _content(namespace.config) if content is None else content
        config, warnings = load_config(text, namespace.config, strict=namespace.strict_config)
    config, more = apply_flags(config, namespace)
    return config, warnings + more


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def apply_flags(config: Config, namespace: argparse.Namespace) -> tuple[Config, list[str]]:
    """Return the configuration with the given flags applied, and warnings, a line each. Raises `ConfigError`."""
    given = list(_given(namespace, CONFIG_FLAGS))
    ports = list(_given(namespace, PORT_FLAGS))
    if not given and not ports:
        return config, []
    data = encode(config)
    set_by: dict[Path, str] = {}
    for flag, raw in given:
        for field in flag.fields:
            path = tuple(field.split("."))
            set_by[path] = flag.option
            _merge(data, path, _READERS[flag.kind](raw, flag.option))
    for flag, raw in ports:
        set_by.setdefault(flag.fields, flag.option)
        _complete(data, flag.fields[0], _integer(raw, flag.option), flag.option)

    def place(at: Path) -> str:
        lengths = range(len(at), 0, -1)
        return next((set_by[at[:length]] for length in lengths if at[:length] in set_by), field_path_text(at))

    refuse_retired_mode(data["mode"], place)
    return check(decode(Config, data, place), place), _warnings(given, ports)


def _add_actions(group: Any) -> None:
    _add(group, "write-config-to", metavar="FILE", help="write the configuration in force, and exit", default=None)
    for name, text in (
        ("cleanup", "remove the rules of kproxy and of kube-proxy, in both modes, and exit"),
        ("init-only", "set the kernel parameters that need root, and exit"),
    ):
        _add_switch(group, name, text)


def _add_switch(group: Any, name: str, text: str) -> None:
    """Add a flag that sets no field of the configuration, but is true or false."""
    _add(group, name, metavar="BOOL", nargs="?", const=True, type=_switch, default=False, help=text)


def _add(group: Any, name: str, **options: Any) -> None:
    """Add a flag, and its spelling with underscores, which kube-proxy takes too but does not show."""
    dest = name.replace("-", "_")
    group.add_argument(*(["-v"] if name == "v" else []), f"--{name}", dest=dest, **options)
    if "-" in name:
        group.add_argument(f"--{dest}", dest=dest, **{**options, "help": argparse.SUPPRESS})


def _given(namespace: argparse.Namespace, flags: tuple[Flag, ...]) -> Iterator[tuple[Flag, Any]]:
    for flag in flags:
        raw = getattr(namespace, flag.name.replace("-", "_"), None)
        if raw is not None and not (raw == "" and flag.blank_is_unset):
            yield flag, raw


def _merge(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a field; gates and vmodule patterns go beside those of the file, before them."""
    for key in path[:-1]:
        data = data[key]
    if path[-1] == "featureGates":
        value = data[path[-1]] | value
    elif path[-1] == "vmodule":
        value = value + data[path[-1]]
    data[path[-1]] = value


def _complete(data: dict[str, Any], field: str, port: int, option: str) -> None:
    if not 0 <= port <= 65535:
        raise must_be(option, "a port from 1 to 65535, or 0 for none", port)
    address = data[field]
    if port == 0:
        data[field] = ""
    elif not has_port(address):
        data[field] = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _warnings(given: list[tuple[Flag, Any]], ports: list[tuple[Flag, Any]]) -> list[str]:
    idle = [flag.option for flag, _ in given if flag in WITHOUT_EFFECT]
    gates = [_gates(raw, flag.option) for flag, raw in given if flag.kind == "gates"]
    return [
        *([f"{', '.join(idle)}: without effect in kproxy"] if idle else []),
        *(f"{flag.option}: {flag.help}" for flag, _ in ports),
        *(line for found in gates for line in gate_warnings(found, "--feature-gates")),
    ]


def _switch(raw: str) -> bool:
    if raw in _TRUE | _FALSE:
        return raw in _TRUE
    raise argparse.ArgumentTypeError(f"must be true or false, not {raw!r}")


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
        raise must_be(option, "a whole number", raw) from None


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


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "text": _text,
    "bool": _boolean,
    "int": _integer,
    "number": _number,
    "list": _list,
    "gates": _gates,
    "vmodule": _vmodule,
}
_ACTIONS = ("cleanup", "init_only")
_PATHS = ("config", "master", "objects", "write_config_to")


def flag_values(config: Config, namespace: argparse.Namespace) -> dict[str, str]:
    """Return all flags of `kproxy run`, by name, with their values as Go's pflag writes them.

    `namespace` is what the command line was parsed to, and `config` the configuration that it made. As in kube-proxy,
    a flag that was not given has its default, whatever the configuration file says.
    """
    given, default = encode(config), encode(Config())
    values = {flag.name: _value(given if _is_given(namespace, flag) else default, flag) for flag in CONFIG_FLAGS}
    values |= {flag.name: _port(namespace, flag, default) for flag in PORT_FLAGS}
    values |= {_name(each): getattr(namespace, each, None) or "" for each in _PATHS}
    values |= {_name(each): _flag_text(bool(getattr(namespace, each, False))) for each in _ACTIONS}
    for flag in CONFIG_FLAGS:
        if not flag.fields:
            values[flag.name] = getattr(namespace, _attribute(flag), "")
    return dict(sorted(values.items()))


def _is_given(namespace: argparse.Namespace, flag: Flag) -> bool:
    return getattr(namespace, _attribute(flag), None) is not None


def _value(data: Any, flag: Flag) -> str:
    if not flag.fields:
        return ""
    for key in flag.fields[0].split("."):
        data = data[key]
    if flag.kind == "vmodule":
        return ",".join(f"{each['filePattern']}={each['verbosity']}" for each in data)
    return _flag_text(data)


def _port(namespace: argparse.Namespace, flag: Flag, default: Any) -> str:
    port: str = default[flag.fields[0]].rpartition(":")[2]
    return str(getattr(namespace, _attribute(flag), port))


def _flag_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ",".join(f"{name}={_flag_text(each)}" for name, each in sorted(value.items()))
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _attribute(flag: Flag) -> str:
    return flag.name.replace("-", "_")


def _name(attribute: str) -> str:
    return attribute.replace("_", "-")
