"""Trains small networks on real data, checks their gradients, and draws what came out."""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

from jax_mps import _files
from jax_mps.cli import files
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
    output = options.output if options.output.suffix else options.output.with_suffix(".png")
    if not files.writable(output):
        return 1
    import matplotlib as mpl

    mpl.use("Agg")  # draws into a file, also where there is no display
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase
    from rich.console import Console

    from jax_mps.cli.demo import accelerated, digits, photographs

    kinds = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in kinds:
        print(
            f"jax_mps: --output must end in one of {', '.join(sorted(kinds))}, got {output}", file=sys.stderr
        )
        return 2
    console = Console()
    start = time.perf_counter()
    parts = [part.run(console, options.seed) for part in (digits, photographs, accelerated)]

    figure = plt.figure(figsize=(10, 7 * len(parts)), layout="constrained")
    for part, panel in zip(parts, figure.subfigures(len(parts), squeeze=False)[:, 0], strict=True):
        part.draw(panel)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=output.suffix[1:])
    if not files.written(output, lambda path: _files.replace(path, picture.getvalue())):
        return 1
    console.print(f"picture   {output}   ({time.perf_counter() - start:.0f} s in all)")
    return 0 if all(part.passed for part in parts) else 1
