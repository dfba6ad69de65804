"""The command line: `python -m jax_mps [info | run | demo | bench | lower]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jax_mps.cli import files, info, interrupts, lower, run
from jax_mps.cli.bench import command as bench
from jax_mps.cli.demo import command as demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 for success, 1 for a failure, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_mps",
        description="Pooling and transposed convolution for JAX with the meaning of Apple's MPS CNN kernels.",
    )
    commands = parser.add_subparsers(metavar="command")
    for name, module, summary in (
        ("info", info, "versions, devices, and which path serves each platform"),
        ("run", run, "run an unmodified program with stock JAX's convolutions and poolings accelerated"),
        (
            "demo",
            demo,
            "train small networks with these layers and in stock Flax, check them, draw a picture",
        ),
        ("bench", bench, "time the named shapes beside stock JAX and PyTorch"),
        ("lower", lower, "print the program of an operation on a platform; check it for Apple's plugins"),
    ):
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parser.set_defaults(run=info.run, require_native=False)
    options = parser.parse_args(arguments)
    if options.run is run.run:  # what the program does with Ctrl-C is its own affair
        return int(run.run(options))
    with interrupts.end_at_once():
        return files.printed(lambda: int(options.run(options)))


if __name__ == "__main__":
    sys.exit(main())
