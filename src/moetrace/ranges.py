"""Whether numbers that somebody passed are in range."""

from __future__ import annotations

import math

from moetrace.errors import MoetraceError


def require_ranges(owner: object, error: type[MoetraceError], **ranges: float | tuple[float, float]) -> None:
    """Raise unless each attribute named is None or in its range; NaN is in none.

    Args:
        owner: whose attributes.
        error: what to raise.
        ranges: the least, or the least and the most, of each.
    """
    for name, limits in ranges.items():
        least, most = limits if isinstance(limits, tuple) else (limits, math.inf)
        value = getattr(owner, name)
        if value is not None and not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise error(f"{name} is out of range", expected=expected, got=value)
