"""The devices of a run: its mesh, and the processes that run it together."""

import contextlib
import os
import pathlib
from collections.abc import Callable


def join(distributed: bool) -> None:
    """Makes this process one of several, if it is and has not been yet.

    A cluster's scheduler that jax knows (SLURM, Open MPI, Kubernetes, Cloud TPU) says which; elsewhere the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      ValueError: neither does.
    """
    import jax

    if not distributed or jax.distributed.is_initialized():
        return
    names = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    try:
        count, number = (int(os.environ[name]) if name in os.environ else None for name in names)
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (ValueError, RuntimeError) as error:
        advice = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start it by a cluster's scheduler"
        raise ValueError(f"--distributed: {error}; {advice}") from error


def using(mesh: str) -> contextlib.AbstractContextManager:
    """A context in which trainers use the mesh of this text, ``data=4,model=2``; nothing for an empty one."""
    if not mesh:
        return contextlib.nullcontext()
    import jax

    from paradigms.mesh import parse_mesh

    # Programs in flight at once on virtual CPU devices wait for each other's threads for ever (XLA ends the process).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax.set_mesh(parse_mesh(mesh))


def first() -> bool:
    """Whether this process is the one that writes."""
    import jax

    return jax.process_index() == 0


def agreed(choose: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The path that the first process chooses, in every process."""
    import jax

    if jax.process_count() == 1:
        return choose()
    import numpy as np
    from jax.experimental import multihost_utils

    text = str(choose()).encode() if first() else b""
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(4096, b"\0"), np.uint8))
    return pathlib.Path(np.asarray(told).tobytes().rstrip(b"\0").decode())
