"""Writes the network of a run as one jax.export file, which predicts with jax alone, and prints how to load it."""

import dataclasses
import pathlib

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    run: tyro.conf.Positional[pathlib.Path]
    """Folder of the run, OUT/<experiment>/<id>."""
    part: str | None = None
    """Which network, where the run saved several."""
    out: pathlib.Path | None = None
    """A new file NAME.jax in the folder of the run. Default: model.jax beside the saved model."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    del root
    from experiments import files
    from paradigms import artefact, load_run
    from paradigms.network import find

    home = find(flags.run, flags.part)
    out = files.new(flags.run, flags.out or home / "model.jax", ".jax")
    network, content = load_run(flags.run, flags.part), artefact(flags.run, flags.part)
    with out.open("xb") as file:
        file.write(content)
    shape = ", ".join(map(str, ("n", *network.shape)))
    print("import pathlib, jax.export")
    print(f"network = jax.jit(jax.export.deserialize(pathlib.Path({str(out)!r}).read_bytes()).call)")
    print(f"outputs = network(x)  # x: {network.dtype} ({shape}){', pixels in [0, 1]' if network.pixels else ''}")
    return 0
