"""Sweeps: many settings trained together where they can be, and the choice among them by validation.

With a function ``make(learning_rate, width)`` that returns a trainer, the rates of each width train as one program:

    settings = pd.grid(learning_rate=[1e-3, 1e-2, 1e-1], width=[64, 256])
    found = pd.sweep(make, source, 2000, settings, seeds=3, validation=digits.validation, patience=5, folder="sweeps/mlp")
    plot(found, "sweeps/mlp/response.png")

The same call goes on where it was cut short. To report a test value, train ``found.best`` anew, with other seeds.
"""

from paradigms.sweep.optuna import optuna_search
from paradigms.sweep.response import plot, table
from paradigms.sweep.run import Sweep, numeric, sweep
from paradigms.sweep.search import choice, log_uniform, random_search, uniform

__all__ = [
    "Sweep",
    "choice",
    "log_uniform",
    "numeric",
    "optuna_search",
    "plot",
    "random_search",
    "sweep",
    "table",
    "uniform",
]
