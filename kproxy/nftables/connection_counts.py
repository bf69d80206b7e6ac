"""Read the connection counters of one family's table."""

from __future__ import annotations

from collections import Counter

from kproxy.host.netlink import DumpInterruptedError, retry_interrupted
from kproxy.model.connection_counts import ConnectionCounts, CountsUnavailableError, Destination
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS
from kproxy.nftables.decode import TableReader
from kproxy.nftables.elements import endpoint_text, frontend_of_endpoint, frontend_text

_VERDICT_MAPS = (names.SERVICE_IPS, names.SERVICE_NODE_PORTS)
_ENDPOINT_MAPS = (
    names.SERVICE_ENDPOINTS,
    names.SERVICE_LOCAL_ENDPOINTS,
    names.NODE_PORT_ENDPOINTS,
    names.NODE_PORT_LOCAL_ENDPOINTS,
)
_DEFINITIONS = {each.name: each for each in SETS}


def read_connection_counts(family: Family, *, endpoints: bool) -> ConnectionCounts | None:
    """Read the counters of the frontends and, with `endpoints`, of the endpoints.

    Return None if the table does not exist. Raises `CountsUnavailableError` if it has no counters, or if it cannot be
    read.
    """
    reader = TableReader(family)
    try:
        return retry_interrupted(lambda: _read_table(reader, family, endpoints=endpoints))
    except DumpInterruptedError:
        raise CountsUnavailableError("tables keep changing while their counters are read; try again") from None
    except OSError as error:
        raise CountsUnavailableError(f"cannot read the {family.value} table: {error.strerror or error}") from None


def _read_table(reader: TableReader, family: Family, *, endpoints: bool) -> ConnectionCounts | None:
    if not reader.exists():
        return None
    layouts = reader.sets((*_VERDICT_MAPS, *_ENDPOINT_MAPS))
    if any(name not in layouts or not layouts[name].counters for name in (*_VERDICT_MAPS, *_ENDPOINT_MAPS)):
        raise CountsUnavailableError(
            f"the {family.value} table {names.TABLE} has no counters; set kproxy.connectionCounters: true in the "
            "configuration of kproxy"
        )
    return _read_counters(reader, endpoints=endpoints)


def _read_counters(reader: TableReader, *, endpoints: bool) -> ConnectionCounts:
    """Read the maps. Elements that other processes added, which name no Service, are omitted."""
    service_ports: dict[bytes, str] = {}
    frontends: dict[Destination, int] = {}
    for name in _VERDICT_MAPS:
        for element, packets in reader.counted_elements(_DEFINITIONS[name]):
            if not element.comment:
                continue
            service_ports[element.key] = element.comment
            frontends[Destination(element.comment, frontend_text(element.key))] = packets or 0
    found: Counter[Destination] = Counter()
    for name in _ENDPOINT_MAPS if endpoints else ():
        for element, packets in reader.counted_elements(_DEFINITIONS[name]):
            service_port = service_ports.get(frontend_of_endpoint(element.key))
            if service_port and isinstance(element.value, bytes):
                found[Destination(service_port, endpoint_text(element.value))] += packets or 0
    return ConnectionCounts(frontends, dict(found))
