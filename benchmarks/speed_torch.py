"""The PyTorch peers on the speed benchmark."""

from collections.abc import Iterator

from benchmarks.speed_methods import Point
from benchmarks.speed_problems import Ready

METHODS: tuple[str, ...] = ()


def absent() -> Iterator[tuple[str, str]]:
    """The peers that are not installed, and how to get them."""
    yield from ()


def points(ready: Ready) -> Iterator[Point]:
    """The grids of those that are installed."""
    yield from ()
