"""The value of each flag in this process, as `/flagz` shows them (KEP-4828)."""

from __future__ import annotations

import argparse
from typing import Any

from kproxy.config.decode import encode
from kproxy.config.flag_table import CONFIG_FLAGS, PORT_FLAGS, Flag
from kproxy.config.types import Config

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
    values |= {_name(each): _text(bool(getattr(namespace, each, False))) for each in _ACTIONS}
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
    return _text(data)


def _port(namespace: argparse.Namespace, flag: Flag, default: Any) -> str:
    port: str = default[flag.fields[0]].rpartition(":")[2]
    return str(getattr(namespace, _attribute(flag), port))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ",".join(f"{name}={_text(each)}" for name, each in sorted(value.items()))
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _attribute(flag: Flag) -> str:
    return flag.name.replace("-", "_")


def _name(attribute: str) -> str:
    return attribute.replace("_", "-")
