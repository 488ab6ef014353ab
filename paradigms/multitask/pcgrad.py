"""Projecting conflicting gradients."""

import jax
import jax.numpy as jnp

from paradigms.objective import Aggregator


def pcgrad() -> Aggregator:
    """Each loss's gradient loses what points against another's, in random order; the results are summed (Yu et al., 2020,
    algorithm 1).

    The running gradient is projected against the others' original ones. Every one of these vectors is a combination of
    the gradients, so only the matrix of their inner products is needed. Gradients that do not conflict are summed.
    """

    def combine(grads, losses, state, ctx):
        del losses
        names = list(grads)
        gram = jnp.stack([jnp.stack([_inner(grads[a], grads[b]) for b in names]) for a in names])

        def project(key, start):
            def against(c, j):  # c: the running gradient as coefficients of the original ones
                dot = c @ gram[:, j]
                step = jnp.where((dot < 0) & (j != start), dot / jnp.maximum(gram[j, j], 1e-12), 0.0)
                return c.at[j].add(-step), None

            order = jax.random.permutation(key, len(names))
            return jax.lax.scan(against, jax.nn.one_hot(start, len(names), dtype=gram.dtype), order)[0]

        keys = jax.random.split(ctx.key, len(names))
        weights = jax.vmap(project)(keys, jnp.arange(len(names))).sum(0)
        direction = jax.tree.map(
            lambda *g: sum((weights[i].astype(x.dtype) * x for i, x in enumerate(g)), start=jnp.zeros_like(g[0])),
            *(grads[name] for name in names),
        )
        return direction, state

    return Aggregator(lambda params, names: (), combine)


def _inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
