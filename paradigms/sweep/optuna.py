"""Optuna as the one that proposes settings; its storage lets several processes and machines share one search."""

from collections.abc import Callable
from typing import Any

from paradigms.sweep.run import sweep
from paradigms.trainer import Trainer


def optuna_search(
    study: Any,
    suggest: Callable[[Any], dict[str, Any]],
    trials: int,
    make: Callable[..., Trainer],
    source: Any,
    steps: "int | Callable[..., int]",
    *,
    batch: int = 8,
    select: str = "accuracy",
    **options: Any,
) -> None:
    """Asks `study` for settings, a batch at a time, trains each batch as a `sweep` and tells it the validation values.

    The study keeps the results, and goes on in its storage where it was. Processes that call this with one storage
    share the trials between them: each stops when the study has enough, those in flight beside it still end. A setting
    that diverged is told as pruned, which samplers take for worse than any value; a batch that was interrupted, as failed.

    Args:
      study: an ``optuna.Study`` of one objective.
      suggest: ``trial -> settings``, in Optuna's own words:
        ``lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}``.
      trials: how many the study shall have in the end, those of earlier calls and other processes included.
      make: as in `sweep`. source, steps: likewise.
      batch: trials asked at once: their floats train together, but none of them learns from the others.
      select: the validation metric, as in `sweep`; the study maximizes it, and minimizes "-name".
      **options: of `sweep`, except ``folder``.

    Raises:
      ValueError: a study of another direction, a `folder`, no trials, and what `sweep` refuses.
    """
    from optuna.trial import TrialState

    direction = "minimize" if select.startswith("-") else "maximize"
    if [one.name.lower() for one in study.directions] != [direction]:
        raise ValueError(f'select="{select}": needs a study of one direction; create it with direction="{direction}"')
    if "folder" in options:
        raise ValueError("folder: the study's storage keeps the results; leave it out")
    for name, value in (("trials", trials), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")

    while (left := trials - len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))) > 0:
        asked = [study.ask() for _ in range(min(batch, left))]
        try:
            rows = [suggest(trial) for trial in asked]
            if any(row.keys() != rows[0].keys() for row in rows):
                raise ValueError("suggest: gave settings of different names; give each trial the same")
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            found = sweep(make, source, steps, columns, select=select, **options)
        except BaseException:
            for trial in asked:
                study.tell(trial, state=TrialState.FAIL)
            raise
        for row in found.rows:
            trial = asked[row["number"]]
            trial.set_user_attr("values", row["values"])
            trial.set_user_attr("best_step", row["best_step"])
            study.tell(trial, None if row["diverged"] else row["value"], TrialState.PRUNED if row["diverged"] else None)
