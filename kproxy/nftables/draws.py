"""How a connection finds its endpoint when nothing but a map knows how many there are.

The endpoints of a frontend are numbered from 0 in a map; a rule draws a number and looks it up. A rule can only draw
below a constant, so the number of endpoints N would have to decide which chain a frontend goes to, and each new
endpoint would change that verdict. The kernel then checks every verdict of the table for loops: 0.1 ms becomes 2.3 ms
at 10,000 Services. Hence a chain serves all N up to its size: who draws a number without an endpoint draws again, which
leaves every endpoint the same chance. The frontends' verdicts change only with the size, and sizes are few.
"""

from __future__ import annotations

from functools import lru_cache

UNEVENNESS = 1 / 500
"""What part of all connections may run out of draws: these go to one of the first endpoints."""


def size_for(endpoints: int) -> int:
    """Return the smallest size that holds so many endpoints: 1, 2, 3, 4, 6, 8, 12, 16, 24, and so on."""
    power = 1 << max(0, (endpoints - 1).bit_length() - 1)
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= endpoints)


@lru_cache(64)
def draws(size: int) -> tuple[int, ...]:
    """Return what a chain of a size draws below, draw after draw, until an endpoint is found.

    The last but one always finds one, as the chain is for more endpoints than the next smaller size. The very last is
    for a packet that is under way while N changes: it has come by the verdict of before and looks at the map of after.
    """
    smaller = size * 3 // 4 if size & (size - 1) == 0 else size * 2 // 3
    missing = (size - smaller - 1) / size
    found = [size]
    while missing ** len(found) > UNEVENNESS:
        found.append(size)
    if missing:
        found.append(smaller)
    if found[-1] > 1:
        found.append(1)
    return tuple(found)
