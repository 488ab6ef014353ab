"""Continual learning."""

from paradigms.continual.ewc import Importance, ewc, exact_fisher
from paradigms.continual.memory import Memory, reservoir
from paradigms.continual.rehearsal import rehearsal

__all__ = ["Importance", "Memory", "ewc", "exact_fisher", "rehearsal", "reservoir"]
