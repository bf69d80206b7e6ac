"""How a command says that it could not do its work."""

from __future__ import annotations


class UsageError(Exception):
    """The command was called wrongly: flags or configuration. Exit code 2."""


class FailureError(Exception):
    """The command could not do what it was asked for. Exit code 1."""
