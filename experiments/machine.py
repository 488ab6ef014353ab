"""What a run ran on, and how long it compiled."""

import contextlib
import importlib.metadata
import math
import os
import pathlib
import platform
import time

COMPILE = ("backend_compile_duration", "jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")


@contextlib.contextmanager
def compile_seconds():
    """Yields a function: the seconds that jax has traced, lowered and compiled so far.

    Tracing one function inside another reports both, so what is added up is the time covered, not the durations.
    """
    import jax

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.rpartition("/")[2] in COMPILE:
            end = time.monotonic()
            spans.append((end - duration_secs, end))

    def covered():
        total, reach = 0.0, -math.inf
        for start, end in sorted(spans):
            total, reach = total + max(0.0, end - max(start, reach)), max(reach, end)
        return total

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield covered
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def device() -> str:
    """What computes: ``cpu: AMD EPYC 7763, 2 cores`` or ``gpu: NVIDIA H200``."""
    import jax

    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{devices[0].platform}: " + (f"{len(devices)} x " if len(devices) > 1 else "") + devices[0].device_kind
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu: {model}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for package in ("paradigms", "jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
