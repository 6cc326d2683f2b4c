"""Aligned text tables that stay within a terminal's width, on screen and when piped."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 116


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0, -1)) -> str:
    """Columns padded to their widest cell, numbers to the right.

    Args:
      header: one title for each column.
      rows: cells as text.
      left: indices of columns that hold words, aligned to the left.
    """
    words = {index % len(header) for index in left}
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "-" * min(WIDTH, sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def wrap(text: str, indent: str = "") -> str:
    """A paragraph broken at the table's width."""
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def seeds_of(records: Sequence[Mapping[str, Any]]) -> str:
    """`seed 0`, or `seeds 0 to 4`."""
    seeds = sorted({record["seed"] for record in records})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def scientific(value: float | None) -> str:
    """`2.1e-5`; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def milliseconds(seconds: float | None) -> str:
    """Three digits at most."""
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def memory(num_bytes: float | None) -> str:
    """Bytes in the unit that keeps the number short."""
    if num_bytes is None:
        return "-"
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def decimals(value: float | None, places: int) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.{places}f}"
