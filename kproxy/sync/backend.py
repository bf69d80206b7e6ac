"""What the reconciler needs of a backend: one for each family, whichever way it programs the kernel."""

from __future__ import annotations

from typing import Protocol

from kproxy.model.context import Context
from kproxy.model.outcome import Plans, Written


class Backend(Protocol):
    """Keeps one family's kernel state equal to the plans that it is given."""

    @property
    def needs_everything(self) -> bool:
        """Whether the next `sync` must be given the plans of all Services, because nothing is known."""

    def verify(self, context: Context) -> bool:
        """Return whether the kernel still holds what it must; if not, forget what is known of it."""

    def forget(self) -> None:
        """Forget what is known of the kernel: the next `sync` looks at all that is there."""

    def sync(self, plans: Plans, context: Context) -> Written:
        """Program the plans of the Services that may have changed; those without plans are gone.

        Raises `SyncError` if the kernel refused.
        """
