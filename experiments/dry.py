"""What an experiment would train, shown without training it."""

import pathlib
import tempfile
from typing import Any

from experiments import settings
from experiments.printing import amount, show


def run(module: Any, name: str, config: Any) -> None:
    """Prints parameters, memory and FLOPs a step of the first training of an experiment, and leaves nothing behind.

    The data is loaded and the step compiled, but not run; of several trainings the first alone is shown.

    Raises:
      ValueError: the experiment ends without training by `paradigms.fit` or a trainer of its own.
    """
    from paradigms import watch
    from paradigms.estimate import estimate, grouped

    settings.bounded(config)
    with tempfile.TemporaryDirectory() as folder, watch.dry():
        try:
            module.run(config, pathlib.Path(folder))
        except watch.DryRun as stopped:
            trainer, source = stopped.trainer, stopped.source
            found = estimate(trainer, stopped.batch, source)
        else:
            raise ValueError(f"--dry-run: {name} trains nothing that could be shown; leave the flag out")
    total = sum(row.count for row in found.parameters)
    rows = [(row.path, row.shape, row.dtype, f"{row.count:,}") for row in grouped(found.parameters)]
    show(f"{name}: parameters", ("parameter", "shape", "dtype", "count"), [*rows, ("total", "", "", f"{total:,}")])
    runs = f" of {trainer.runs} runs" if trainer.runs else ""
    memory = [(what, amount(size, "B", 1024)) for what, size in found.memory.items()]
    print()
    show(f"memory{runs}", (f"memory{runs}", "size"), [*memory, ("total", amount(sum(found.memory.values()), "B", 1024))])
    examples = getattr(source, "batch_size", None)
    per_step = f"{amount(found.flops, 'FLOP')} a step{runs}" + (f" ({examples} examples each)" if examples else "")
    print(f"\n{per_step}, in matrix products and convolutions; nothing was trained")
