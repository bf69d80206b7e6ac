"""kube-proxy's configuration: its file, its flags, and their validation."""

from kproxy.config.decode import ConfigError
from kproxy.config.flags import add_flags, apply_flags, configure
from kproxy.config.load import as_document, load_config, to_yaml
from kproxy.config.types import Config, node_name

__all__ = [
    "Config",
    "ConfigError",
    "add_flags",
    "apply_flags",
    "as_document",
    "configure",
    "load_config",
    "node_name",
    "to_yaml",
]
