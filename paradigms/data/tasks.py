"""A sequence of tasks over one data set, as sources of batches, for continual learning.

What differs from run to run (the order of the classes, the permutations, the angles) follows from the run's key, so that the
seeds of one vectorized program each have a stream of their own. Batches have a leaf "task", (B,) int32, the number of their
task.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.data.bind import bind
from paradigms.data.checks import check_batch_size
from paradigms.data.order import locate, order
from paradigms.data.sources import Source, finish

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """A sequence of tasks over one data set, as sources of batches.

    Attributes:
      parts: {"train", "validation", "test"}: {"rows": the split, sorted by group, "first": (G,) int32 where each group
        begins, "count": (G,) int32 its examples}. A group is a class, or a task of `tasks_of`.
      table: (tasks, outputs) bool, which outputs of the network belong to which task.
      plan: ``key -> {"groups": (tasks, K) int32, ...}``, what depends on the run: the groups of each task, and the view.
      view: ``(plan, rows, tasks, which) -> rows``: a split's rows `which` as their tasks show them.
      sizes: {part: the most examples a task can have}.
    """

    parts: dict[str, Any]
    table: np.ndarray
    plan: Callable
    view: Callable
    sizes: dict[str, int]

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.table)

    def train(
        self,
        task: int,
        batch_size: int,
        *,
        start: Any = 0,
        since: int | None = None,
        transform: Callable | None = None,
    ) -> Source:
        """Shuffled batches of one task, epoch after epoch, each example once an epoch.

        Args:
          task: 0 to ``len(self) - 1``.
          batch_size: 1 to the examples of the smallest task.
          start: the step at which the task begins.
          since: also the tasks from this one on: 0 is cumulative training, and with the last task joint training.
          transform: ``(key, batch) -> batch``, as in `resident`.

        Returns:
          the source; its size is that of the largest task, times the tasks it spans. Those of all tasks, and of equal
          spans, share one program.
        """
        since = task if since is None else since
        if not 0 <= since <= task < len(self):
            raise ValueError(f"task={task}, since={since}: must be in 0 to {len(self) - 1}, and since not after task")
        check_batch_size(batch_size, self._smallest("train"))
        most = (task - since + 1) * self.sizes["train"]
        arrays = {"part": self.parts["train"], "since": since, "task": task, "start": start}
        get = bind(_shuffled, batch_size, most, self.view, transform)
        return Source(jax.tree.map(jnp.asarray, arrays), get, most, batch_size, prepare=bind(_planned, self.plan))

    def whole(self, part: str, task: int, batch_size: int = 512, most: int | None = None) -> Source:
        """One task in order, once, for `Trainer.tally` and `Trainer.boundary`; the last rows are padding of weight 0.

        Args:
          part: "train", "validation" or "test".
          task: 0 to ``len(self) - 1``.
          batch_size: 1 or more.
          most: at most this many of its examples, the first of a shuffled order; None is all, in the set's own order.
        """
        if part not in self.parts:
            raise ValueError(f'part="{part}": must be one of {tuple(self.parts)}')
        if not 0 <= task < len(self):
            raise ValueError(f"task={task}: must be in 0 to {len(self) - 1}")
        if most is not None and most < 1:
            raise ValueError(f"most={most}: must be 1 or more")
        size = self.sizes[part] if most is None else min(most, self.sizes[part])
        check_batch_size(batch_size, max(batch_size, 1))
        arrays = jax.tree.map(jnp.asarray, {"part": self.parts[part], "task": task})
        get = bind(_in_order, batch_size, self.sizes[part], size, most is not None, self.view)
        return Source(arrays, get, size, batch_size, prepare=bind(_planned, self.plan))

    def drifting(self, batch_size: int, steps: int, width: float = 0.0, foreign: float = 0.0, *, start: Any = 0) -> Source:
        """The whole stream without boundaries: tasks follow each other every `steps` steps and mix around the changes.

        Examples are drawn with replacement. Within `width` / 2 steps of a change the share of the next task grows linearly
        (fuzzy boundaries); besides, a share `foreign` of all examples is of any other task (blurry tasks).

        Args:
          steps: of each task, 1 or more.
          width: steps over which two tasks mix, 0 (a sharp change) to `steps`.
          foreign: in [0, 1).
          start: the step at which the stream begins.

        Returns:
          a source; a run of ``len(self) * steps`` updates sees it all.
        """
        if steps < 1 or not 0 <= width <= steps or not 0 <= foreign < 1:
            raise ValueError(f"steps={steps}, width={width}, foreign={foreign}: must be >= 1, in [0, steps], in [0, 1)")
        check_batch_size(batch_size, max(batch_size, 1))
        arrays = jax.tree.map(jnp.asarray, {"part": self.parts["train"], "start": start})
        get = bind(_drifting, batch_size, steps, float(width), float(foreign), len(self), self.view)
        size = self.sizes["train"] * len(self)
        return Source(arrays, get, size, batch_size, prepare=bind(_planned, self.plan))

    def _smallest(self, part: str) -> int:
        counts = np.sort(np.asarray(self.parts[part]["count"]))
        groups = jax.eval_shape(self.plan, jax.random.key(0))["groups"].shape[1]
        return int(counts[:groups].sum())


def _planned(arrays, key, plan):
    return {**arrays, "plan": plan(jax.random.fold_in(key, 2))}


def _sizes(arrays):
    return arrays["part"]["count"][arrays["plan"]["groups"]]


def _row(arrays, task, within):
    """The row of example number `within` of each task."""
    part, sizes = arrays["part"], _sizes(arrays)[task]
    ends = jnp.cumsum(sizes, -1)
    slot = jnp.sum(within[:, None] >= ends, -1)[:, None]
    before = jnp.take_along_axis(ends - sizes, slot, 1)[:, 0]
    group = jnp.take_along_axis(arrays["plan"]["groups"][task], slot, 1)[:, 0]
    return part["first"][group] + within - before


def _batch(arrays, task, within, view):
    rows = jnp.clip(_row(arrays, task, within), 0)
    return {**view(arrays["plan"], arrays["part"]["rows"], task, rows), "task": task}


def _shuffled(arrays, key, step, batch_size, most, view, transform):
    totals = _sizes(arrays).sum(-1)
    number = jnp.arange(len(totals))
    ends = jnp.cumsum(jnp.where((number >= arrays["since"]) & (number <= arrays["task"]), totals, 0))
    epoch, position = locate(step - arrays["start"], batch_size, ends[-1], most)
    position = order(jax.random.fold_in(key, arrays["task"]), epoch, position, ends[-1])
    task = jnp.sum(position[:, None] >= ends[None], -1, dtype=jnp.int32)
    within = position - (ends - totals)[task]
    return finish(_batch(arrays, task, within, view), key, step, transform)


def _in_order(arrays, key, step, batch_size, most, size, shuffled, view):
    number = step * batch_size + jnp.arange(batch_size)
    total = _sizes(arrays).sum(-1)[arrays["task"]]
    within = jnp.minimum(number, jnp.minimum(total, size) - 1)
    if shuffled:
        within = order(jax.random.fold_in(key, 3), 0, within, total)
    task = jnp.broadcast_to(arrays["task"], within.shape)
    batch = finish(_batch(arrays, task, within, view), key, step, None)
    return {**batch, "weight": (number < jnp.minimum(total, size)).astype(jnp.float32)}


def _drifting(arrays, key, step, batch_size, steps, width, foreign, tasks, view):
    k1, k2, k3, k4 = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 4), step), 4)
    place = (step - arrays["start"]).astype(jnp.float32) + 0.5
    now = jnp.clip(place // steps, 0, tasks - 1)
    nearest = jnp.clip(jnp.round(place / steps), 1, max(tasks - 1, 1))  # the change that is nearest, after task nearest - 1
    share = jnp.clip((place - nearest * steps) / max(width, 1e-9) + 0.5, 0, 1)
    later = jax.random.bernoulli(k1, share, (batch_size,))
    mixing = (jnp.abs(place - nearest * steps) < width / 2) & (tasks > 1)
    task = jnp.where(mixing, jnp.where(later, nearest, nearest - 1), now).astype(jnp.int32)
    other = (task + jax.random.randint(k2, (batch_size,), 1, max(tasks, 2))) % tasks
    task = jnp.where(jax.random.bernoulli(k3, foreign, (batch_size,)), other, task)
    totals = _sizes(arrays).sum(-1)[task]
    within = jnp.minimum((jax.random.uniform(k4, (batch_size,)) * totals).astype(jnp.int32), totals - 1)
    return finish(_batch(arrays, task, within, view), key, step, None)
