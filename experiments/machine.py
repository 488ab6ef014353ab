"""What a run ran on, and how much memory it took."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import sys


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has held so far: on the "host", and on the fullest "device" where it counts them."""
    import jax

    found = {}
    with contextlib.suppress(ImportError):  # a module of Unix
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host"] = peak if sys.platform == "darwin" else peak * 1024
    counted = [(one.memory_stats() or {}).get("peak_bytes_in_use") for one in jax.local_devices()]
    if peaks := [peak for peak in counted if peak is not None]:
        found["device"] = max(peaks)
    return found


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
