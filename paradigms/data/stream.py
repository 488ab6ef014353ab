"""Sets that do not fit in memory: a grain pipeline behind the interface of `Source`."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from paradigms.data.checks import check_arrays, check_batch_size
from paradigms.data.sources import Source, stacked
from paradigms.data.splits import check_seed


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Batches read by the host, with the interface of `Source`; `chunk` moves the next ones to the device.

    Attributes:
      pipeline: `pipeline[step]` is the host batch at step, any step at any time.
      transform: applied on the device, `(key, batch) -> batch`.
      size: examples in an epoch.
      batch_size: rows of each batch.
    """

    pipeline: Any
    transform: Callable | None
    size: int
    batch_size: int
    pool: concurrent.futures.ThreadPoolExecutor | None
    ahead: dict = dataclasses.field(default_factory=dict)

    def batch(self, key, step: int) -> dict:
        """The batch at a step. Inside a jitted loop use `chunk`.

        Args:
          key: the same for the whole run.
          step: a Python int, >= 0: reading happens on the host.

        Returns:
          A dict of device arrays (batch_size, ...).

        Raises:
          ValueError: where step < 0.
        """
        return self.chunk(int(step), 1).batch(key, step)

    def chunk(self, step: int, n: int) -> Source:
        """A `Source` with the batches of steps [step, step + n) on the device.

        With workers, reading of the n steps after these begins, to go on while the device works on these.

        Args:
          step: the first, >= 0; may be one a run, all alike.
          n: >= 1.

        Returns:
          The source.

        Raises:
          ValueError: where n < 1 or step < 0.
        """
        step = int(np.ravel(step)[0])
        if n < 1 or step < 0:
            raise ValueError(f"asked for {n} batches from step {step}: n must be >= 1 and step >= 0")
        rows = [self._read(i) for i in range(step, step + n)]
        if self.pool is not None:
            for i in [i for i in self.ahead if not step <= i < step + 2 * n]:
                self.ahead.pop(i).cancel()
            for i in range(step + n, step + 2 * n):
                self._read(i)
            rows = [row.result() for row in rows]
            for i in range(step, step + n):
                self.ahead.pop(i, None)
        return stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), step, self.size, self.transform)

    def _read(self, step):
        if self.pool is None:
            return self.pipeline[step]
        if step not in self.ahead:
            self.ahead[step] = self.pool.submit(self.pipeline.__getitem__, step)
        return self.ahead[step]

    def close(self) -> None:
        """Stops the workers; reading ahead that has not begun is dropped. Streams without workers need no close."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that cover the examples once, rounded up."""
        return -(-self.size // self.batch_size)


def stream(
    dataset,
    batch_size: int,
    *,
    seed: int = 0,
    transform: Callable | None = None,
    workers: int = 0,
    shuffle: bool = True,
) -> Stream:
    """Batches of a set that is read as it is needed, through grain.

    The order is a function of (seed, step) by random access, so a resumed run needs nothing but its step. Batches run
    across epoch borders, each epoch in another order, every example once.

    Args:
      dataset: a grain `MapDataset`, or anything with `len` and `[i]`, of dicts of arrays or numbers of fixed shapes. A
        TFDS source becomes one by `grain.MapDataset.source(tfds.data_source(...)).map(lambda r: {"x": r["image"], "y":
        r["label"]})`; random maps on it are seeded by `seed`.
      batch_size: 1 to the number of examples.
      seed: of the order and of the dataset's random maps.
      transform: as in `resident`, on the device.
      workers: threads that read ahead; 0 reads when asked. Threads help where reading waits or decodes in C.
      shuffle: False takes the examples in order, round and round.

    Returns:
      The stream.

    Raises:
      ValueError: where the set is empty, its first record is no dict of finite numbers or has a negative label, or
        batch_size, seed or workers is out of range. Only the first record is read and checked here.
    """
    import grain  # half a second to import, needed by those that stream alone

    check_seed(seed)
    if workers < 0:
        raise ValueError(f"workers is {workers}, must be >= 0 (0 reads without threads)")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"dataset is a {type(dataset).__name__}, must have len and [i]: grain.MapDataset.source(...)")
    if len(dataset) == 0:
        raise ValueError("dataset is empty (0 examples): was everything filtered away?")
    size = len(dataset)
    check_batch_size(batch_size, size)
    first = dataset[0]
    if not isinstance(first, dict):
        raise ValueError(f'dataset gives a {type(first).__name__}, must give dicts such as {{"x": ..., "y": ...}}')
    check_arrays({name: np.asarray(value)[None] for name, value in first.items()}, what="dataset[0]")
    pipeline = dataset if isinstance(dataset, grain.MapDataset) else grain.MapDataset.source(dataset)
    pipeline = pipeline.seed(seed)
    if shuffle:
        pipeline = pipeline.shuffle()
    pipeline = pipeline.repeat().batch(batch_size)
    pool = concurrent.futures.ThreadPoolExecutor(workers, "stream") if workers else None
    return Stream(pipeline, transform, size, batch_size, pool)
