"""Few-shot episodes sampled on the device from a labelled split."""

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.data.bind import bind
from paradigms.data.checks import check_labels
from paradigms.data.order import order
from paradigms.data.sources import Source
from paradigms.data.transforms import pixels


def episodes(split: dict, *, ways: int, shots: int, queries: int, tasks: int) -> Source:
    """Batches of classification tasks (Vinyals et al., 2016): random classes, in a random order of labels for each task.

    A batch is ``{"support": {"x": (tasks, ways * shots, ...), "y": (tasks, ways * shots)}, "query": ...}``; support and
    query rows of a class are disjoint, labels are 0 to ways - 1, images float32 in [0, 1].

    Args:
      split: {"x", "y"}, examples first; each class with the rows of the smallest class, the first of them.
      ways: classes a task, >= 1.
      shots: support rows a class, >= 1.
      queries: query rows a class, >= 1.
      tasks: tasks a batch, >= 1.

    Returns:
      A source of such batches; `size` counts the rows in use.

    Raises:
      ValueError: no "x" or "y", or labels that are not integers (N,); fewer classes than `ways`, or a class with fewer
        rows than shots + queries.
    """
    labels = check_labels(split)
    if "x" not in split:
        raise ValueError(f'split has no inputs "x", only {sorted(split)}')
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    fewest = min(len(rows) for rows in members)
    if not 1 <= ways <= len(members):
        raise ValueError(f"ways={ways}: must be in [1, {len(members)}], the classes of the split")
    if min(shots, queries, tasks) < 1 or shots + queries > fewest:
        raise ValueError(
            f"shots={shots}, queries={queries}, tasks={tasks}: must be 1 or more, with shots + queries <= {fewest}, the rows "
            "of the smallest class"
        )
    table = np.stack([rows[:fewest] for rows in members]).astype(np.int32)
    arrays = {"x": jnp.array(split["x"]), "rows": jnp.asarray(table)}
    return Source(arrays, bind(_sample, ways, shots, queries, tasks), table.size, tasks)


def _sample(arrays, key, step, ways, shots, queries, tasks):
    table = arrays["rows"]
    classes, each = table.shape

    def task(key):
        of_classes, of_rows = jax.random.split(key)
        chosen = order(of_classes, 0, jnp.arange(ways), classes)
        # each class an "epoch" of its own: another permutation of its rows
        picked = order(of_rows, jnp.arange(ways)[:, None], jnp.arange(shots + queries)[None], each)
        rows = jnp.take_along_axis(table[chosen], picked, axis=1)
        labels = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32)[:, None], rows.shape)

        def part(select):
            return {"x": pixels(arrays["x"][select(rows).reshape(-1)]), "y": select(labels).reshape(-1)}

        return {"support": part(lambda r: r[:, :shots]), "query": part(lambda r: r[:, shots:])}

    return jax.vmap(task)(jax.random.split(jax.random.fold_in(key, step), tasks))
