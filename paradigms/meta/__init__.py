"""Meta-learning."""

from paradigms.meta.maml import maml

__all__ = ["maml"]
