"""Create and delete the namespaces of the tests."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.real.api import NAMESPACES, Api, object_path
from tests.e2e.real.objects import namespace
from tests.e2e.waiting import until


def create_namespace(api: Api, name: str) -> None:
    """Create a namespace; return once its default ServiceAccount exists, which pods require."""
    api.create(NAMESPACES, namespace(name))
    account = object_path("ServiceAccount", name, "default")
    until(lambda: api.find(account) is not None, f"namespace {name} has its default ServiceAccount")


def delete_namespace(api: Api, name: str) -> None:
    """Start deleting a namespace and everything in it."""
    api.delete(f"{NAMESPACES}/{name}")


def is_gone(api: Api, name: str) -> Callable[[], bool]:
    """Return a condition: the namespace and everything in it is deleted."""
    return lambda: api.find(f"{NAMESPACES}/{name}") is None
