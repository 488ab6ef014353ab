"""Model-agnostic meta-learning."""

import jax
import jax.numpy as jnp
import optax

from paradigms.batch import rows, weighted_mean
from paradigms.objective import Objective, concrete, merge, total


def maml(child: Objective, inner: optax.GradientTransformation, steps: int = 1) -> Objective:
    """Params from which a few gradient steps on a task's support set do well on its query set (Finn et al., 2017, eq. 1).

    theta_0 = theta, theta_k = theta_{k-1} - inner(grad L_support(theta_{k-1})); the loss is the mean over tasks of
    L_query(theta_K), differentiated through all the steps. Each step is recomputed in the backward pass, so memory does
    not grow with their number.

    A batch is an episode: ``{"support": batch, "query": batch}`` under a leading axis of tasks. Each task has keys of its
    own. The child's state threads through a task's steps; over tasks, batch statistics are averaged and the rest stays.
    ``predict`` adapts to the support set and answers the query set, tasks and queries flattened into rows.

    Args:
      child: any objective.
      inner: the inner optimizer. Its second derivative must exist: ``optax.sgd`` has it, Adam only with ``eps_root > 0``.
      steps: inner steps, 0 or more; 0 is the child on the query set.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: must be 0 or more")
    inner = optax.with_extra_args_support(inner)

    def adapt(params, state, support, ctx):
        fixed = {name: slot for name, slot in params.items() if name == "taps"}

        @jax.checkpoint
        def step(carry, i):
            fast, state, opt_state = carry

            def loss(fast):
                values, (new, _) = child.losses({**fast, **fixed}, state, support, ctx.fold(i))
                return total(values), new

            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(fast)
            updates, opt_state = inner.update(grads, opt_state, fast, value=value, grad=grads, value_fn=lambda p: loss(p)[0])
            return (optax.apply_updates(fast, updates), state, opt_state), None

        fast = {name: slot for name, slot in params.items() if name != "taps"}
        (fast, state, _), _ = jax.lax.scan(step, (fast, state, inner.init(fast)), jnp.arange(steps))
        return {**fast, **fixed}, state

    def each(function, batch):
        episodes = {"support": batch["support"], "query": batch["query"]}
        return jax.vmap(function)(jnp.arange(rows(episodes)), episodes)

    def init(key, batch):
        for part in ("support", "query"):
            if part not in batch:
                raise ValueError(f'batch: maml needs {{"support": ..., "query": ...}} and got leaves {sorted(batch)}')
            if all(map(concrete, jax.tree.leaves(batch[part]))):  # the values of all tasks, not of the first alone
                examples = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch[part])
                jax.eval_shape(lambda key, examples=examples: child.init(key, examples), key)
        return child.init(key, jax.tree.map(lambda leaf: leaf[0], batch["query"]))

    def losses(params, state, batch, ctx):
        def one(i, episode):
            here = ctx.fold(i)
            fast, adapted = adapt(params, state, episode["support"], here.fold("support"))
            values, (adapted, aux) = child.losses(fast, adapted, episode["query"], here.fold("query"))
            return values, adapted, {name: value for name, value in aux.items() if name != "per_example"}

        values, states, aux = each(one, batch)
        values, aux = ({name: weighted_mean(v, batch) for name, v in part.items()} for part in (values, aux))
        return values, (merge(state, states), aux)

    def predict(params, state, batch, ctx):
        def one(i, episode):
            here = ctx.fold(i)
            train = type(here)(here.key, here.step, here.task, train=True)
            fast, adapted = adapt(params, state, episode["support"], train.fold("support"))
            return child.predict(fast, adapted, episode["query"], here.fold("query"))[0]

        outputs = each(one, batch)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs), state

    def boundary(params, state, batches, ctx, event):
        # the child sees the query sets of all the tasks as its stacked batches
        query = None if batches is None else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches["query"])
        return child.boundary(params, state, query, ctx, event)

    return Objective(init, losses, predict, child.after, boundary)
