"""Draws the pictures of the documentation that are in git. Run it after a change of numbers.

A chart for every `benchmarks/*.json`, and the windows of the start page. Needs matplotlib and the library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
COLOURS = ("#1971c2", "#d9480f", "#2b8a3e", "#9c36b5")  # ours first; readable on white and on black
GREY = "#868e96"


def draw_ratios(numbers: dict[str, Any], path: Path) -> None:
    """How many times our time everyone takes: one line a row, one dot a contender."""
    ours, *others = numbers["contenders"]
    rows = [row for row in numbers["rows"] if row["times"][ours] is not None]
    figure, axes = _figure(len(rows))
    axes.axvline(1, color=COLOURS[0], label=ours)
    for name, colour in zip(others, COLOURS[1:], strict=False):
        ratios = {
            place: row["times"][name] / row["times"][ours]
            for place, row in enumerate(rows)
            if row["times"][name] is not None
        }
        axes.plot(ratios.values(), ratios.keys(), "o", markersize=4, color=colour, label=name)
    axes.set(xscale="log", xlabel="times as long as jax_mps (logarithmic)")
    _finish(figure, axes, [f"{row['shape']}, {row['operation']}" for row in rows], path)


def draw_values(numbers: dict[str, Any], path: Path) -> None:
    """The numbers themselves: one line a row, one dot a column."""
    rows = numbers["rows"]
    figure, axes = _figure(len(rows))
    for name, colour in zip(numbers["contenders"], COLOURS, strict=True):
        values = [row["times"][name] for row in rows]
        axes.plot(values, range(len(rows)), "o", markersize=4, color=colour, label=name)
    axes.set(xscale="log", xlabel=f"{numbers['unit']} (logarithmic)")
    _finish(figure, axes, [row["shape"] for row in rows], path)


def draw_windows(path: Path) -> None:
    """The picture of the start page: windows of 3 by 3 pixels, every second pixel, one pixel of padding."""
    from jax_mps import mps

    kernel = mps.MPSCNNPoolingMax(
        kernel_width=3,
        kernel_height=3,
        stride_in_pixels_x=2,
        stride_in_pixels_y=2,
        edge_mode=mps.MPSImageEdgeMode.CLAMP,
    )
    mps.draw_windows(kernel, (7, 7), (4, 4)).save(path)


def _figure(rows: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same numbers give the same file.
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "jax_mps", "font.size": 8, "font.family": "sans-serif"}
    )
    return pyplot.subplots(figsize=(7.5, 1 + 0.17 * rows), layout="constrained")


def _finish(figure: Any, axes: Any, names: list[str], path: Path) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    for side in axes.spines.values():
        side.set_color(GREY)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=GREY)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    """Draws everything."""
    for source in sorted((DOCS / "benchmarks").glob("*.json")):
        numbers = json.loads(source.read_text())
        draw = draw_values if numbers["unit"] == "instructions" else draw_ratios
        draw(numbers, source.with_suffix(".svg"))
    (DOCS / "pictures").mkdir(exist_ok=True)
    draw_windows(DOCS / "pictures" / "windows.svg")


if __name__ == "__main__":
    main()
