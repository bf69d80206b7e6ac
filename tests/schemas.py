"""Write the JSON schemas of all reports to `docs/schemas/`: `python -m tests.schemas`."""

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from pathlib import Path

import kproxy.diagnose
from kproxy.diagnose.report import Report, schema

FOLDER = Path(__file__).parent.parent / "docs/schemas"


def kinds() -> list[type[Report]]:
    """Return all kinds of reports that kproxy defines."""
    for module in pkgutil.walk_packages(kproxy.diagnose.__path__, "kproxy.diagnose."):
        import_module(module.name)
    found = [kind for kind in Report.__subclasses__() if kind.__module__.startswith("kproxy.")]
    return sorted(found, key=lambda kind: kind.__name__)


def schema_text(kind: type[Report]) -> str:
    """Return the schema of a kind as it stands in its file."""
    return json.dumps(schema(kind), indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write the schemas."""
    FOLDER.mkdir(exist_ok=True)
    for kind in kinds():
        (FOLDER / f"{kind.__name__}.json").write_text(schema_text(kind))


if __name__ == "__main__":
    main()
