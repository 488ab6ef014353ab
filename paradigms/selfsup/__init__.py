"""Self-supervised learning."""

from paradigms.selfsup.byol import Views, byol

__all__ = ["Views", "byol"]
