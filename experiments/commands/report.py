"""Writes one self-contained HTML page of a run, or of several side by side."""

import dataclasses
import pathlib

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Folders of runs, OUT/<experiment>/<id>; also of runs that have not ended."""
    out: pathlib.Path | None = None
    """The page, FILE.html. Default: report.html in the folder of the run, or here if there are several."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    del root
    if not flags.runs:
        raise ValueError("report: no runs; give one folder or more, OUT/<experiment>/<id>")
    out = flags.out or (flags.runs[0] if len(flags.runs) == 1 else pathlib.Path()) / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out}: is no page; give a file that ends in .html")
    from experiments import pages

    print(pages.write(flags.runs, out))
    return 0
