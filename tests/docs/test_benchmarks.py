"""The tables of docs/benchmarks.md, and that of the README, have the numbers of the JSON files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
SOURCES = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))

# What the README calls a row of epyc.json.
OPERATIONS = {
    "max pooling": "pull_back",
    "average pooling": "pull_back",
    "L2 pooling": "pull_back",
    "transposed convolution, weights": "gradient_weights",
    "the same, depthwise": "gradient_weights",
    "training step of a whole network": "train_step",
}


def table(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without its title and its rule."""
    block = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert block
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in block[0].splitlines()[2:]]


def number(cell: str) -> float | None:
    """What a cell says before its bracket."""
    return None if cell == "-" else float(cell.split()[0])


def test_every_file_has_a_table_and_a_chart() -> None:
    text = PAGE.read_text()
    assert re.findall(r"\]\(benchmarks/(\w+\.json)\)", text) == [
        Path(name).with_suffix(".json").name for name in re.findall(r"\]\(benchmarks/(\w+\.svg)\)", text)
    ]
    assert {path.name for path in SOURCES} == set(re.findall(r"\]\(benchmarks/(\w+\.json)\)", text))
    assert all(path.with_suffix(".svg").exists() for path in SOURCES)


def test_random_poolings() -> None:
    """Geometric means, and how often the others are faster."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for source in sorted((ROOT / "docs" / "benchmarks" / "random").glob("seed_*.json")):
        for row in json.loads(source.read_text())["rows"]:
            times = row["times"]
            torch = min(t for name, t in times.items() if name.startswith("torch"))
            of = ratios.setdefault(row["operation"], {"stock": [], "torch": []})
            of["stock"].append(times["lax"] / times["native"])
            of["torch"].append(torch / times["native"])
    found = [
        [
            op,
            *(
                cell
                for r in of.values()
                for cell in (f"{geometric_mean(r):.2f}", f"{share_below_1(r):.0f} %")
            ),
        ]
        for op, of in ratios.items()
    ]
    text = PAGE.read_text().partition("## Random poolings")[2].partition("Seeds 0, 1 and 2")[2]
    assert table(text) == found
    step = ratios["step"]
    stock, torch = (f"{geometric_mean(r):.1f} times" for r in step.values())
    claim = f"{stock} as long, PyTorch {torch}"
    assert claim in (ROOT / "README.md").read_text()


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def share_below_1(ratios: list[float]) -> float:
    return 100 * sum(r < 1 for r in ratios) / len(ratios)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_table_has_the_numbers(source: Path) -> None:
    numbers = json.loads(source.read_text())
    rows = table(PAGE.read_text().partition(f"(benchmarks/{source.stem}.svg)")[2])
    assert len(rows) == len(numbers["rows"])
    for cells, row in zip(rows, numbers["rows"], strict=True):
        names = [row[key] for key in ("shape", "operation") if key in row]
        if source.stem.startswith("other_shapes"):
            names = names[:1]  # all of them are gradients
        assert cells[: len(names)] == names
        times = cells[len(names) :][: len(numbers["contenders"])]
        assert [number(cell) for cell in times] == list(row["times"].values())
        ratios_agree(times, row["times"])
        if "percent_of_dot" in row:
            assert cells[-1] == f"{row['percent_of_dot']} %"


def ratios_agree(cells: list[str], times: dict[str, Any]) -> None:
    """The brackets say how many times the first number the others are, as far as rounding allows."""
    ours = next(iter(times.values()))
    for cell in cells:
        bracket = re.search(r"\((.*)\)", cell)
        time = number(cell)
        if bracket and time is not None:
            assert float(bracket[1]) == pytest.approx(time / ours, rel=0.06, abs=0.06)


def test_readme_has_the_numbers() -> None:
    numbers = json.loads((ROOT / "docs" / "benchmarks" / "epyc.json").read_text())
    times = {(row["shape"], row["operation"]): list(row["times"].values()) for row in numbers["rows"]}
    rows = table((ROOT / "README.md").read_text().partition("## Speed")[2])
    assert len(rows) == len(OPERATIONS)
    for shape, operation, *cells in rows:
        assert [number(cell) for cell in cells] == times[shape, OPERATIONS[operation]]
