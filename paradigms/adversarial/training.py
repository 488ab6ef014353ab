"""Adversarial training: the child's losses on inputs that an attack has chosen."""

import jax
from jax.tree_util import DictKey

from paradigms.adversarial.attacks import Attack
from paradigms.batch import inputs, with_inputs
from paradigms.objective import Objective, total


def adversarial(child: Objective, attack: Attack) -> Objective:
    """min over w of E max over delta of the child's losses at x + delta (Madry et al., 2018, eq. 2.1).

    The attack maximises the sum of the child's losses with respect to every leaf "x" of the batch, under the dropout
    mask of the step; what the child's state does meanwhile is discarded, and it moves once, on the attacked batch.
    No gradient passes through the attack. Predictions are on the inputs as they are given.

    Order: ``rehearsal(adversarial(x))`` stores clean examples and attacks the replayed ones too;
    ``adversarial(rehearsal(x))`` attacks the stream alone and stores what it attacked.

    Args:
      child: any objective.
      attack: `pgd`, `fgsm` or ``(loss, x, key) -> x``. Radius 0 is the child.
    """

    def losses(params, state, batch, ctx):
        fixed = jax.lax.stop_gradient((params, state))

        clean = inputs(batch)

        def attacked(x):
            return with_inputs(batch, jax.tree.map(lambda rows, leaf: rows.reshape(leaf.shape), x, clean))

        def harm(x):
            return total(child.losses(*fixed, attacked(x), ctx)[0])

        x = attack(harm, jax.tree.map_with_path(_examples, clean), ctx.fold("attack").key)
        return child.losses(params, state, attacked(jax.lax.stop_gradient(x)), ctx)

    return child._replace(losses=losses)


def _examples(path, leaf):
    """An example a row: the tasks of an episode and their rows become one axis, so that each has a budget of its own."""
    episode = any(part in (DictKey("support"), DictKey("query")) for part in path)
    return leaf.reshape(-1, *leaf.shape[2:]) if episode else leaf
