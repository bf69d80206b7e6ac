"""Configuration files for the tests of `kproxy.config`."""

from __future__ import annotations

import pytest

from kproxy.config import Config, ConfigError, load_config

HEADER = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
"""The first two lines of every configuration file. The fields of a test start at line 3."""


def load(fields: str) -> Config:
    """Load a YAML file `kp.yaml` of the header and these fields, which must not cause warnings."""
    config, warnings = load_config((HEADER + fields).encode(), "kp.yaml")
    assert warnings == []
    return config


def load_warnings(fields: str) -> list[str]:
    """Return the warnings from loading a YAML file `kp.yaml` of the header and these fields."""
    return load_config((HEADER + fields).encode(), "kp.yaml")[1]


def load_error(text: str | bytes, path: str = "kp.yaml", *, strict: bool = False) -> str:
    """Return the error from loading the text of a complete file."""
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ConfigError) as caught:
        load_config(content, path, strict=strict)
    return str(caught.value)
