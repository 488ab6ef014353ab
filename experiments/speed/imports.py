"""Import time of ``paradigms`` against jax, flax and optax alone, and what it must not import.

python -m experiments.speed.imports
"""

import statistics
import subprocess
import sys
import time

HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "orbax", "grain", "torch", "rich")
BASE = "import jax, flax, optax; from flax import nnx"


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main():
    for code in (BASE, "import paradigms"):  # fill the disk cache
        seconds(code)
    pairs = [(seconds("import paradigms"), seconds(BASE)) for _ in range(9)]
    ours, base = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import paradigms {ours:.2f} s; {BASE!r} {base:.2f} s; ratio {statistics.median(a / b for a, b in pairs):.2f}")
    code = f"import sys, paradigms; print([name for name in {HEAVY} if name in sys.modules])"
    print("imported besides:", subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
