"""Aligned text: columns that stay columns whatever the names, numbers a reader can take in, wrapped notes."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 120
_GAP = "  "


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      header: its lines, with the unit.
      cells: one per row.
      numeric: right-aligned; text is left-aligned.
      narrowest: width below which it is not cut; None if it may not be cut at all.
      keep_end: cut in the middle, not at the end: names often differ at their ends.
    """

    header: tuple[str, ...]
    cells: Sequence[str]
    numeric: bool = True
    narrowest: int | None = None
    keep_end: bool = False


def lay_out(columns: Sequence[Column], width: int = WIDTH) -> list[str]:
    """The lines of a table, headers first; columns that may be cut are, the widest first, until it fits `width`."""
    columns = [column._replace(cells=[" ".join(cell.split()) for cell in column.cells]) for column in columns]
    widths = [max(len(text) for text in (*column.header, *column.cells)) for column in columns]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    for _ in range(excess):
        spare = [i for i, c in enumerate(columns) if c.narrowest is not None and widths[i] > c.narrowest]
        if spare:
            widths[max(spare, key=widths.__getitem__)] -= 1
    depth = max(len(column.header) for column in columns)
    headers = [("",) * (depth - len(column.header)) + column.header for column in columns]
    rows = [*zip(*headers, strict=True), *zip(*(column.cells for column in columns), strict=True)]
    return [_line(row, columns, widths) for row in rows]


def _line(cells: Iterable[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    aligned = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        fitted = _shorten(cell, width, (width - 1) // 2 if column.keep_end else 0)
        aligned.append(fitted.rjust(width) if column.numeric else fitted.ljust(width))
    return _GAP.join(aligned).rstrip()


def _shorten(text: str, width: int, tail: int) -> str:
    """`text` in at most `width` characters, the last `tail` of them from its end."""
    if len(text) <= width:
        return text
    head = width - 1 - tail
    return f"{text[:head]}…{text[len(text) - tail :]}"


def wrap(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    """A paragraph broken into lines, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def number(value: float | None, form: str) -> str:
    """A number in a format; `-` for None."""
    return "-" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds, to three digits."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds, "")
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def memory(num_bytes: int | None) -> str:
    """Bytes in the unit that leaves a readable number."""
    if num_bytes is None:
        return "-"
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{num_bytes} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def share(value: float) -> str:
    """A relative difference in words: percent where that is readable."""
    if not 1e-2 <= value < 10:
        return "0" if value == 0 else f"{value:.1e}"
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def strength(beta: complex, form: str) -> str:
    """A nudging strength in a format; a complex one by modulus and angle."""
    if beta.imag == 0:
        return format(beta.real, form)
    return f"{abs(beta):{form}} at {math.degrees(math.atan2(beta.imag, beta.real)):.0f}°"


def listing(names: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
