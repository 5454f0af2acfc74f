"""Tables as text: every column as wide as its widest cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], justified: Callable[[str, int], str] = str.ljust) -> Iterator[str]:
    """The line of each row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(justified, row, widths)).rstrip()


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table with its header."""
    for line in aligned([header, *([str(cell) for cell in row] for row in rows)]):
        print(line)
