"""Namespaces of the tests' own."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.real.api import NAMESPACES, Api, place
from tests.e2e.real.objects import namespace
from tests.e2e.waiting import until


def make_namespace(api: Api, name: str) -> None:
    """Make a namespace; return once it takes pods, which need the account that a controller makes."""
    api.create(NAMESPACES, namespace(name))
    account = place("ServiceAccount", name, "default")
    until(lambda: api.find(account) is not None, f"namespace {name} has its account")


def delete_namespace(api: Api, name: str) -> None:
    """Begin to delete a namespace and all in it."""
    api.delete(f"{NAMESPACES}/{name}")


def is_gone(api: Api, name: str) -> Callable[[], bool]:
    """Return what tells whether a namespace and all in it is deleted."""
    return lambda: api.find(f"{NAMESPACES}/{name}") is None
