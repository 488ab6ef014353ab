"""Prints the Markdown table of all results, or puts it into the README that is named."""

import dataclasses
import pathlib

import tyro

from experiments import catalog


@dataclasses.dataclass(frozen=True)
class Flags:
    readme: tyro.conf.Positional[pathlib.Path | None] = None
    """A Markdown file with the two marker comments, between which the table goes."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    if flags.readme is None:
        print(catalog.table(root))
    else:
        catalog.update_readme(flags.readme, root)
    return 0
