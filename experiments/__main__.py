"""``python -m experiments``: the list; ``... <name> --help``: one experiment's flags; ``... --help``: the commands."""

import ast
import dataclasses
import difflib
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

from experiments.catalog import HERE, find, results, shown
from experiments.runner import Options, execute


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


def listing(root: pathlib.Path = HERE) -> None:
    """Prints every experiment: summary, first published number, ours."""
    ours, rows = results(root), []
    for name, entry in find(root).items():
        measured = ours.get(name, {}).get("metrics", {})
        metric = next((metric for metric in entry.published if metric in measured), next(iter(entry.published), ""))
        metric = metric or next(iter(measured), "")
        paper = shown(entry.published.get(metric), "std")
        rows.append((name, entry.summary, metric or "—", paper, shown(measured.get(metric))))
    show("Experiments", ("experiment", "summary", "metric", "published", "ours"), rows)
    print("\npython -m experiments <experiment> --help shows its settings.")


def commands() -> dict[str, str]:
    """The summary of every command, by name, read from its source."""
    found = sorted(path for path in (HERE / "commands").glob("*.py") if path.stem != "__init__")
    texts = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in found}
    return {name: (text or "").partition("\n")[0] for name, text in texts.items()}


def usage(root: pathlib.Path = HERE) -> None:
    """Prints how the command line is used, and the list of experiments."""
    print(f"usage: python -m {root.name} [<experiment> | <command>] [flags]\n")
    show("Commands", ("command", "summary"), list(commands().items()))
    print()
    listing(root)


def _cache() -> None:
    """Compiled programs are kept between processes, unless the environment says where or not at all."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and chosen is None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/paradigms/jax").expanduser()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def command(name: str, flags: Sequence[str], root: pathlib.Path = HERE) -> int:
    """Runs the command `name` with command-line `flags`; returns the exit code."""
    import tyro

    module = importlib.import_module(f"experiments.commands.{name}")
    given = tyro.cli(module.Flags, args=list(flags), prog=f"python -m {root.name} {name}", description=module.__doc__)
    _cache()
    return module.main(given, root)


def launch(name: str, flags: Sequence[str], root: pathlib.Path = HERE) -> int:
    """Runs the experiment `name` with command-line `flags`; returns the exit code."""
    import tyro

    module = importlib.import_module(f"{root.name}.{name}")
    flat = tyro.conf.arg(name="")
    fields = [("config", Annotated[module.Config, flat]), ("options", Annotated[Options, flat])]
    both = dataclasses.make_dataclass("Flags", fields, frozen=True)
    try:
        flags_given = tyro.cli(both, args=list(flags), prog=f"python -m {root.name} {name}", description=module.__doc__)
        _cache()
        folder, result = execute(module, name, flags_given.config, flags_given.options, root)
    except (ValueError, OSError) as error:
        return fail(error, "--debug" in flags)
    except KeyboardInterrupt:
        print("interrupted; --resume FOLDER goes on", file=sys.stderr)
        return 130
    metrics, published = result["metrics"], result["published"]
    rows = []
    for metric in {**metrics, **published}:
        paper = published.get(metric, {})
        rows.append((metric, shown(metrics.get(metric)), shown(paper, "std"), str(paper.get("source", ""))))
    show(name, ("metric", "ours ± 95%", "published ± std", "source"), rows)
    print(folder)
    return 0


def fail(error: Exception, debug: bool = False) -> int:
    """Says `error` in one line on standard error, or with its traceback; returns the exit code 2."""
    if debug or os.environ.get("PARADIGMS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    else:
        print(f"error: {' '.join(str(error).split())} (--debug shows the traceback)", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None, root: pathlib.Path = HERE) -> int:
    """The command line: the list, a command (`commands`) or an experiment with its flags; returns the exit code."""
    name, *flags = list(sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if name in ("", "-h", "--help"):
            usage(root) if name else listing(root)
            return 0
        if name in commands():
            return command(name, flags, root)
    except (ValueError, OSError) as error:
        return fail(error)
    names, name = list(find(root)), name.removesuffix(".py").replace("/", ".")
    if name not in names:
        by_end = [known for known in names if known.rpartition(".")[2] == name]
        close = by_end or difflib.get_close_matches(name, [*names, *commands()], 3, 0.4)
        advice = f"did you mean {' or '.join(close)}?" if close else f"python -m {root.name} lists them"
        print(f"error: no experiment {name!r}; {advice}", file=sys.stderr)
        return 2
    return launch(name, flags, root)


if __name__ == "__main__":
    sys.exit(main())
