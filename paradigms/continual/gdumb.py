"""GDumb: the stream only fills a memory, and the network is trained on the memory alone."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from paradigms.batch import rows, weigh
from paradigms.continual import incoming
from paradigms.continual.memory import Memory, at_least_one
from paradigms.data.order import locate, order
from paradigms.gradients import descent, split_taps
from paradigms.objective import Batch, Objective, hide, own


def gdumb(
    child: Objective,
    memory: Memory,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
    name: str = "memory",
) -> Objective:
    """Greedy sampler and dumb learner (Prabhu et al., 2020): trains from scratch on the memory at the end of each task.

    On the stream the loss is 0 and the params stay, whatever the trainer's optimizer; rows are stored as in `rehearsal`. At
    a boundary "end" the child is initialised anew with a key of the boundary and makes `steps` updates on shuffled epochs of
    what is stored; its params and state take the place of the present ones, and its own boundary "end" comes after.
    Predictions are the child's, of the network of the last boundary.

    The paper's schedule (SGDR, from 0.05 to 0.0005, momentum 0.9, weight decay, gradients clipped) is the optimizer::

        rate = optax.sgdr_schedule([{"init_value": 0.05, "peak_value": 0.05, "end_value": 5e-4, "warmup_steps": 0,
                                     "decay_steps": epoch * 2**i} for i in range(8)])
        optax.chain(optax.clip(10.0), optax.add_decayed_weights(1e-6), optax.sgd(rate, 0.9))  # epoch: rows / batch_size

    Order: outside is what follows the stream, inside what is trained on the memory: ``gdumb(adversarial(x), ...)`` makes
    robust networks. Whatever the child carries starts anew with it.

    Args:
      child: any objective; for episodes a row is a task.
      memory: what is kept; the paper's is `class_balanced`.
      optimizer: of the training on the memory; its state starts anew.
      steps: updates on the memory at each boundary, static, 0 or more; the child's ``ctx.step`` counts them.
      batch_size: rows of an update, 1 or more; a memory with fewer rows repeats them.
      augment: ``(key, batch) -> batch``, of the rows of an update.
      name: the slot of ``state``: {"kept": the memory, "incoming": the rows of this step}.

    Raises:
      ValueError: settings out of range, or (at init) leaves of the batch that differ in rows.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: must be 0 or more")
    at_least_one(batch_size=batch_size)
    inner, update = hide(child, name), descent(child, optimizer)

    def init(key, batch):
        params, state = child.init(key, batch)
        return params, own(state, name, incoming.init(memory, batch))

    def losses(params, state, batch, ctx):
        del params, ctx
        return {"gdumb": jnp.zeros(())}, ({**state, name: incoming.wait(state[name], batch, {})}, {})

    def after(params, state, update, ctx):
        del params
        return update.old, {**state, name: incoming.store(memory, state[name], ctx.fold(f"{name}/insert").key)}

    def boundary(params, state, batches, ctx, event):
        if event == "end":
            params, fresh = trained(state[name]["kept"], ctx.fold(name))
            state = {**fresh, name: state[name]}
        return inner.boundary(params, state, batches, ctx, event)

    def trained(kept, ctx):
        """The child after its training on a memory: params, state."""
        held, valid = memory.stored(kept)
        slots, count = jnp.argsort(~valid, stable=True), jnp.maximum(jnp.sum(valid), 1)  # filled slots first
        most = max(rows(held), batch_size)

        def batch_at(step):
            epoch, position = locate(step, batch_size, count, most)
            which = slots[order(ctx.fold("order").key, epoch, position % count, count)]
            batch = weigh(jax.tree.map(lambda leaf: leaf[which], held), valid[which].astype(jnp.float32))
            return batch if augment is None else augment(ctx.fold("augment").fold(step).key, batch)

        def one(carry, step):
            params, state, opt_state = carry
            now = dataclasses.replace(ctx.fold("step").fold(step), step=step, train=True)
            return update(params, state, opt_state, batch_at(step), now), None

        params, state = child.init(ctx.fold("init").key, batch_at(jnp.zeros((), jnp.int32)))
        start = params, state, optimizer.init(split_taps(params)[0])
        (params, state, _), _ = jax.lax.scan(one, start, jnp.arange(steps, dtype=jnp.int32))
        return params, state

    return inner._replace(init=init, losses=losses, after=after, boundary=boundary)
