"""``python -m experiments``: the list; ``... <name> --help``: one experiment's flags; ``... --help``: the commands."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

from experiments import dry
from experiments.catalog import HERE, find, results, shown
from experiments.printing import amount, show
from experiments.runner import Options, execute


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


def parse(kind: Any, flags: Sequence[str], module: Any, prog: str) -> Any:
    """`flags` as the dataclass `kind`; where they are none, one line on standard error instead of tyro's box, and exit."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(flags), prog=prog, description=module.__doc__)
    except SystemExit as stopped:
        if stopped.code:
            text = lambda line: line.strip("─-╰╯")  # nothing of a rule, which is dashes where there is no Unicode
            lines = (line.strip(" │") for line in said.getvalue().splitlines()[1:])  # the first is a title
            message = itertools.takewhile(text, itertools.dropwhile(lambda line: not text(line), lines))
            print(f"error: {' '.join(' '.join(message).split())} ({prog} --help shows the flags)", file=sys.stderr)
        raise


def command(name: str, flags: Sequence[str], root: pathlib.Path = HERE) -> int:
    """Runs the command `name` with command-line `flags`; returns the exit code."""
    module = importlib.import_module(f"experiments.commands.{name}")
    given = parse(module.Flags, flags, module, f"python -m {root.name} {name}")
    _cache()
    return module.main(given, root)


def launch(name: str, flags: Sequence[str], root: pathlib.Path = HERE) -> int:
    """Runs the experiment `name` with command-line `flags`; returns the exit code."""
    import tyro

    from paradigms.interrupt import Stopped

    module = importlib.import_module(f"{root.name}.{name}")
    flat = tyro.conf.arg(name="")
    fields = [("config", Annotated[module.Config, flat]), ("options", Annotated[Options, flat])]
    both = dataclasses.make_dataclass("Flags", fields, frozen=True)
    try:
        given = parse(both, flags, module, f"python -m {root.name} {name}")
        _cache()
        if given.options.dry_run:
            dry.run(module, name, given.config)
            return 0
        folder, result = execute(module, name, given.config, given.options, root)
    except Exception as error:
        if not expected(error):
            raise
        return fail(error, " (--debug shows the traceback)", "--debug" in flags)
    except Stopped as stopped:
        print(f"{stopped}: {again(root, name, flags, stopped)}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt as stopped:
        print(f"interrupted; it goes on from what it had saved: {again(root, name, flags, stopped)}", file=sys.stderr)
        return 130
    metrics, published = result["metrics"], result["published"]
    rows = []
    for metric in {**metrics, **published}:
        paper = published.get(metric, {})
        rows.append((metric, shown(metrics.get(metric)), shown(paper, "std"), str(paper.get("source", ""))))
    show(name, ("metric", "ours ± 95%", "published ± std", "source"), rows)
    memory = "".join(f", {place} memory {amount(peak, 'B', 1024)}" for place, peak in result.get("memory", {}).items())
    print("compiled {compile} s, ran {run} s".format_map(result["seconds"]) + memory, file=sys.stderr)
    print(folder)
    return 0


def again(root: pathlib.Path, name: str, flags: Sequence[str], stopped: BaseException) -> str:
    """The command that goes on with the run that `stopped` left; its folder is a note of it (see `execute`)."""
    resumed = any(flag.partition("=")[0] == "--resume" for flag in flags)
    folder = [] if resumed else ["--resume", *getattr(stopped, "__notes__", ["FOLDER"])[-1:]]
    return shlex.join(["python", "-m", root.name, name, *flags, *folder])


def expected(error: Exception) -> bool:
    """Whether the user can mend `error`; any other is a mistake in the code and keeps its traceback."""
    memory = "RESOURCE_EXHAUSTED", "Out of memory allocating"  # a RuntimeError of jax's
    return isinstance(error, ValueError | OSError | OverflowError | MemoryError) or any(one in str(error) for one in memory)


def fail(error: Exception, advice: str = "", debug: bool = False) -> int:
    """Says `error` in one line on standard error, or with its traceback; returns the exit code 2."""
    if debug or os.environ.get("PARADIGMS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    else:
        print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None, root: pathlib.Path = HERE) -> int:
    """The command line: the list, a command (`commands`) or an experiment with its flags; returns the exit code."""
    # XLA says of programs kept on a processor with AVX-512 that they may not run there, which they do: jax-ml/jax#38445
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    name, *flags = list(sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if name in ("", "-h", "--help"):
            usage(root) if name else listing(root)
            return 0
        if name in commands():
            return command(name, flags, root)
    except Exception as error:
        if not expected(error):
            raise
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
