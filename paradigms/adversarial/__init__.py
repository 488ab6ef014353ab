"""Adversarial training and attacks."""

from paradigms.adversarial.attacks import Attack, fgsm, pgd
from paradigms.adversarial.threat import Threat, l2, linf
from paradigms.adversarial.training import adversarial

__all__ = ["Attack", "Threat", "adversarial", "fgsm", "l2", "linf", "pgd"]
