"""Rows of text as an aligned table."""

from collections.abc import Iterable


def table(rows: Iterable[list[str]]) -> list[str]:
    """Lines with the columns of `rows` aligned; all rows have as many cells as the first."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
