"""The random shapes of the benchmark: what the set has, its bounds, and the command."""

import json

import pytest

from jax_mps import __main__ as cli
from jax_mps.cli.bench import command
from jax_mps.cli.bench.random_shapes import random_pooling
from jax_mps.cli.bench.shapes import PoolingShape

MANY = random_pooling(1000, 7)


def test_the_same_for_the_same_seed_everywhere():
    assert [(shape.name, layout) for shape, layout in random_pooling(3, 1)] == [
        ("max 7x26x55x92x1 k2 s1 p1", "channels_first"),
        ("avg 11x130x196 k5 s3 p1", "channels_first"),
        ("max 2x37x67x60x10 k3 s2 p1", "channels_last"),
    ]
    assert random_pooling(20, 5)[:7] == random_pooling(7, 5)
    assert random_pooling(7, 6) != random_pooling(7, 5)


def test_the_set_has_all_kinds_and_the_ends_of_all_ranges():
    shapes = [shape for shape, _ in MANY]
    assert {layout for _, layout in MANY} == {"channels_last", "channels_first"}
    assert {shape.kind for shape in shapes} == {"max", "avg", "l2"}
    assert {shape.ndim for shape in shapes} == {1, 2, 3}
    assert {shape.stride for shape in shapes} == {1, 2, 3, 4}
    assert {shape.window for shape in shapes if shape.ndim < 3} == set(range(1, 16))
    assert {shape.window for shape in shapes if shape.ndim == 3} == set(range(1, 7))
    assert {shape.padding for shape in shapes} == set(range(8))
    for values, bounds in (
        ([shape.channels for shape in shapes], (1, 512)),
        ([n for shape in shapes for n in shape.spatial], (5, 200)),
        ([shape.batch for shape in shapes], (1, 64)),
    ):
        assert min(values) == bounds[0]
        assert 0.95 * bounds[1] < max(values) <= bounds[1]


def test_work_is_bounded():
    for shape, _ in MANY:
        assert 2**17 <= shape.source_size <= 2**23
        assert shape.result_size * shape.taps <= 2**26
        assert min(shape.pooled) >= 1
        assert shape.padding <= shape.window // 2


def _tiny(count, seed):
    assert (count, seed) == (2, 3)
    shapes = [
        (PoolingShape("", "max", 2, (6, 5), 3, window=3, stride=2, padding=1), "channels_first"),
        (PoolingShape("", "avg", 2, (7,), 3, window=2, stride=2), "channels_last"),
    ]
    return [(PoolingShape(**{**vars(shape), "name": str(shape)}), layout) for shape, layout in shapes]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "random_pooling", _tiny)
    path = tmp_path / "random.json"
    quick = ["--rounds", "3", "--seconds", "0.01", "--peers", "lax"]
    assert cli.main(["bench", "--random", "2", "--seed", "3", *quick, "--json", str(path)]) == 0
    assert "random shapes of seed 3" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["seed"] == 3
    assert [(r["shape"], r["layout"], r["op"]) for r in report["results"]] == [
        (shape.name, layout, op)
        for shape, layout in _tiny(2, 3)
        for op in ("forward", "keep", "pull_back", "step")
    ]
    assert cli.main(["bench", "--markdown", str(path)]) == 0
    markdown = capsys.readouterr().out
    assert "The shapes are the random ones of seed 3." in markdown
    assert "| max 2x6x5x3 k3 s2 p1 | keep |" in markdown
    assert "| keep | forward | " in markdown


@pytest.mark.parametrize("option", [("--layouts", "channels_first"), ("--batch", "2")])
def test_layouts_and_batches_are_drawn(option, capsys):
    assert cli.main(["bench", "--random", "2", *option]) == 2
    assert "layouts and batches of their own" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--random", "0"), ("--random", "2", "--models", "tcn")])
def test_wrong_use(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *wrong])
    assert raised.value.code == 2
