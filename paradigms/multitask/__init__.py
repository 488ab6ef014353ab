"""Multi-task learning."""

from paradigms.multitask.joint import multitask
from paradigms.multitask.pcgrad import pcgrad

__all__ = ["multitask", "pcgrad"]
