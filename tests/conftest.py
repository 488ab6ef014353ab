"""Eight CPU devices, strict broadcasting, and a compilation cache that later runs share."""

import gc
import itertools
import os
import pathlib

# level 0: nearly all of the time of these tests is compilation, and what they compile runs for milliseconds
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# in the environment, so that processes that tests start share it
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # see experiments.__main__: else tests that read what is said fail

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_enable_async_dispatch", False)  # see paradigms.mesh: eight devices on few threads


gc.set_threshold(50_000, 20, 50)  # traces are many small objects that live long: looking through them took a seventh

MAPS = pathlib.Path("/proc/self/maps")
TESTS = itertools.count(1)


def pytest_xdist_auto_num_workers(config):
    """``-n auto`` is one process more than there are cores: some tests wait, for a process that they kill or for the disk."""
    return (os.cpu_count() or 1) + 1


def pytest_itemcollected(item):
    """Where tests run in several processes, those that share a fixture of their module do so in one of them."""
    found = [item._fixtureinfo.name2fixturedefs.get(name, ()) for name in item.fixturenames]
    if any(definitions and definitions[-1].scope == "module" for definitions in found):
        item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs before there are too many: each maps memory, and Linux gives a process 65,530 maps."""
    yield
    if next(TESTS) % 10 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """A test in float64."""
    with jax.enable_x64(True):
        yield
