"""Trains small networks on real data, checks their gradients, and draws what came out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from jax_mps.cli.extras import missing

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("jax_mps_demo.png"),
        metavar="PATH",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the weights and of the order of the data (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Runs every part; the status is 1 if any missed what it promises."""
    if missing("demo", "flax", "matplotlib", "optax", "rich", "sklearn"):
        return 2
    import matplotlib as mpl

    mpl.use("Agg")  # draws into a file, also where there is no display
    from matplotlib import pyplot as plt
    from rich.console import Console

    from jax_mps.cli.demo import accelerated, digits, photographs

    console = Console()
    start = time.perf_counter()
    parts = [part.run(console, options.seed) for part in (digits, photographs, accelerated)]

    figure = plt.figure(figsize=(10, 7 * len(parts)), layout="constrained")
    for part, panel in zip(parts, figure.subfigures(len(parts), squeeze=False)[:, 0], strict=True):
        part.draw(panel)
    figure.savefig(options.output, dpi=120)
    console.print(f"picture   {options.output}   ({time.perf_counter() - start:.0f} s in all)")
    return 0 if all(part.passed for part in parts) else 1
