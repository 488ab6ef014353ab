"""Prints the Markdown tables of all results, or puts them into the README that is named."""

import dataclasses
import pathlib

import tyro

from experiments import tables


@dataclasses.dataclass(frozen=True)
class Flags:
    readme: tyro.conf.Positional[pathlib.Path | None] = None
    """A Markdown file with the two marker comments, between which the tables go."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    if flags.readme is None:
        print(tables.tables(root))
    else:
        tables.update_readme(flags.readme, root)
    return 0
