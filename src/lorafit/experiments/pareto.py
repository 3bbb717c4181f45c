"""Which candidates are worth their price: no other one is both cheaper and better."""

from __future__ import annotations

from collections.abc import Mapping


def front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """The names of the points that no other one beats, the cheapest first.

    Args:
        points: price and loss by name; less is better of both.

    >>> front({"small": (1, 2.0), "large": (9, 1.5), "poor": (5, 2.1)})
    ('small', 'large')
    """

    def beaten(name: str) -> bool:
        price, loss = points[name]
        return any(
            other[0] <= price and other[1] <= loss and other != (price, loss)
            for each, other in points.items()
            if each != name
        )

    return tuple(sorted((name for name in points if not beaten(name)), key=lambda name: (*points[name], name)))
