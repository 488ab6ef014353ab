"""Projecting conflicting gradients."""

import jax
import jax.numpy as jnp
import optax

from paradigms.objective import Aggregator


def pcgrad() -> Aggregator:
    """Each loss's gradient loses what points against another's, in random order; the results are summed (Yu et al., 2020,
    algorithm 1).

    The running gradient is projected against the others' original ones. Every one of these vectors is a combination of
    the gradients, so only the matrix of their inner products is needed. Gradients that do not conflict are summed. As in
    the paper the projections concern shared weights: arrays on which every loss has a gradient. Those of single tasks,
    such as heads, get the plain sum.
    """

    def combine(grads, losses, state, ctx):
        del losses
        names = list(grads)
        shared = jax.tree.map(lambda *g: jnp.all(jnp.stack([jnp.any(x != 0) for x in g])), *grads.values())
        common = [jax.tree.map(lambda s, x: jnp.where(s, x, 0), shared, grads[name]) for name in names]
        gram = jnp.stack([jnp.stack([optax.tree.vdot(a, b) for b in common]) for a in common])

        def project(key, start):
            def against(c, j):  # c: the running gradient as coefficients of the original ones
                dot = c @ gram[:, j]
                step = jnp.where((dot < 0) & (j != start), dot / jnp.where(gram[j, j] > 0, gram[j, j], 1.0), 0.0)
                return c.at[j].add(-step), None

            order = jax.random.permutation(key, len(names))
            return jax.lax.scan(against, jax.nn.one_hot(start, len(names), dtype=gram.dtype), order)[0]

        keys = jax.random.split(ctx.key, len(names))
        weights = jax.vmap(project)(keys, jnp.arange(len(names))).sum(0)

        def combined(s, *g):
            return sum(
                (jnp.where(s, w, 1.0).astype(x.dtype) * x for w, x in zip(weights, g, strict=True)), start=jnp.zeros_like(g[0])
            )

        return jax.tree.map(combined, shared, *grads.values()), state

    return Aggregator(lambda params, names: (), combine)
