"""Tables and sizes on the terminal."""

from collections.abc import Sequence


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: a drawn one on a terminal, aligned columns elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if console.is_terminal:
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def amount(number: float, unit: str = "", base: int = 1000) -> str:
    """``12345678, "FLOP"`` as ``12.3 MFLOP``; with a base of 1024, bytes as ``11.8 MiB``."""
    prefixes = iter(("", *(f"{prefix}{'i' if base == 1024 else ''}" for prefix in "kMGTP")))
    prefix = next(prefixes)
    while number >= base:
        try:
            prefix = next(prefixes)
        except StopIteration:
            break
        number /= base
    return f"{number:.4g} {prefix.replace('ki', 'Ki')}{unit}".rstrip()
