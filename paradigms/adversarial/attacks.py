"""Attacks: ``(loss, x, key) -> x`` maximising a loss of the inputs under a threat model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paradigms.adversarial.threat import Threat
from paradigms.objective import Tree, concrete, fold

Attack = Callable[[Callable[[Tree], jax.Array], Tree, jax.Array], Tree]


def pgd(
    threat: Threat,
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Projected gradient ascent (Madry et al., 2018, eq. 2): x <- clip(x0 + P(x + a * direction(grad) - x0)).

    Args:
      threat: the set of perturbations.
      steps: gradient steps, 0 or more; 0 with ``random_start`` is a random perturbation, without it no attack.
      step_size: a, in the units of the input. Default: 2.5 radius / steps.
      random_start: begin at a uniform point of the set rather than at the input.
      bounds: smallest and largest value of an input, applied after the projection. Inputs lie within them, since a
        network normalises inside: standardised ones would be clipped, at any radius.

    Returns:
      an attack that gives the last iterate; `x` may be a tree of inputs, each float with the example axis first.

    Raises:
      ValueError: negative steps or step size, bounds out of order, or (at the call) inputs that are not floats.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: must be 0 or more")
    if step_size is not None and concrete(step_size) and not step_size >= 0:
        raise ValueError(f"step_size={step_size}: must be 0 or more, in the units of the input")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds={bounds}: give the smallest and the largest value of an input")
    size = 2.5 * threat.radius / max(steps, 1) if step_size is None else step_size

    def attack(loss, x, key):
        leaves, structure = jax.tree.flatten(x)
        if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            raise ValueError(f"x: inputs have dtypes {[str(leaf.dtype) for leaf in leaves]}; an attack needs floats")

        def confine(candidate):
            return jax.tree.map(lambda c, clean: jnp.clip(clean + threat.project(c - clean), *bounds), candidate, x)

        def ascend(_, current):
            grads = jax.grad(loss)(current)
            return confine(jax.tree.map(lambda c, g: c + size * threat.direction(g), current, grads))

        if random_start:
            starts = [leaf + threat.start(fold(key, i), leaf) for i, leaf in enumerate(leaves)]
            begin = confine(jax.tree.unflatten(structure, starts))
        else:
            begin = x
        return jax.lax.fori_loop(0, steps, ascend, begin)

    return attack


def fgsm(threat: Threat, bounds: tuple[float, float] = (0.0, 1.0)) -> Attack:
    """One step of the whole radius from the input itself (Goodfellow et al., 2015, section 4)."""
    return pgd(threat, 1, threat.radius, random_start=False, bounds=bounds)
