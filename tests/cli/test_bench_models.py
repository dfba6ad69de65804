"""The networks of the benchmark, in tiny: stock Flax, the same under `accelerate()`, and PyTorch agree."""

from __future__ import annotations

import functools
import importlib.util
import json

import jax
import numpy as np
import pytest

import jax_mps
from jax_mps import __main__ as cli
from jax_mps.cli.bench.models.catalogue import MODELS, Model

pytest.importorskip("flax")

from jax_mps.cli.bench.models import family
from jax_mps.cli.bench.models.flax_layers import Network, variables

# What is smaller than in the catalogue: arguments, and inputs.
TINY = {
    "resnet18": ({"depths": (1, 1), "width": 8, "classes": 5}, (2, 32, 32, 3)),
    "resnet50": ({"depths": (1, 2), "width": 4, "classes": 5}, (2, 32, 32, 3)),
    "mobilenet_v2": (
        {"stages": ((1, 8, 1, 1), (6, 8, 2, 2)), "head": 16, "classes": 5}, (2, 32, 32, 3)
    ),
    "efficientnet_b0": (
        {"stages": ((1, 8, 1, 1, 3), (6, 8, 2, 2, 5)), "head": 16, "classes": 5}, (2, 32, 32, 3)
    ),
    "convnext_t": ({"depths": (1, 1), "widths": (8, 16), "classes": 5}, (2, 32, 32, 3)),
    "unet_2x2": ({"width": 4, "levels": 3}, (2, 16, 16, 3)),
    "unet_4x4": ({"width": 4, "levels": 3}, (2, 16, 16, 3)),
    "gan": ({"width": 4}, (2, 1, 1, 10), (2, 64, 64, 3)),
    "hifigan_v2": ({"width": 16, "windows": (3, 7), "dilations": (1, 3)}, (2, 4, 6)),
    "tcn": ({"width": 4, "levels": 3}, (2, 32, 3)),
    "state_space": ({"width": 8, "blocks": 2}, (2, 16, 8)),
    "unet_3d": ({"width": 4, "levels": 2}, (2, 8, 8, 8, 1)),
}  # fmt: skip


def _tiny(name: str) -> Model:
    sizes, *inputs = TINY[name]
    function = MODELS[name].function
    assert isinstance(function, functools.partial)
    return Model(functools.partial(function.func, **{**function.keywords, **sizes}), tuple(inputs))


def _results(name: str, op: str, who: str, dtype: str = "float32") -> list[np.ndarray]:
    contender = family.model_case(name, _tiny(name), op, [who], dtype).contenders[who]()
    return list(contender.fetch(contender.call()))


def _assert_near(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert np.all(np.isfinite(other))
        assert np.max(np.abs(other)) > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * np.max(np.abs(other)))


QUICK = ("tcn", "unet_3d")


def test_every_model_is_here():
    assert set(TINY) == set(MODELS)


@pytest.mark.parametrize("name", ["tcn", "unet_2x2"])
def test_half_precision(name, native):
    stock, ours = (_results(name, "train_step", who, "bfloat16") for who in ("lax", "native"))
    for one, other in zip(ours, stock, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-2 * np.max(np.abs(other)))


@pytest.mark.parametrize("op", family.Models.ops)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in TINY]
)
def test_accelerated_and_torch_are_stock(name, op, native):
    stock = _results(name, op, "lax")
    with jax_mps.accelerate() as handle:
        _assert_near(_results(name, op, "native"), stock)
    assert any(row.ours for row in handle.report())
    if importlib.util.find_spec("torch"):
        _assert_near(_results(name, op, "torch"), stock)


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet18", "gan", "unet_3d"])
def test_torch_channels_last(name):
    pytest.importorskip("torch")
    _assert_near(_results(name, "train_step", "torch_channels_last"), _results(name, "train_step", "lax"))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.69), ("resnet50", 25.56), ("mobilenet_v2", 3.50), ("efficientnet_b0", 5.29),
        ("convnext_t", 28.58),
    ],
)  # fmt: skip
def test_classifiers_have_the_published_number_of_parameters(name, millions):
    shapes = jax.eval_shape(
        lambda: variables(Network(MODELS[name].function, train=True), MODELS[name].inputs)
    )
    assert sum(a.size for a in jax.tree.leaves(shapes["params"])) == pytest.approx(millions * 1e6, rel=2e-3)


def test_batches_are_scaled():
    assert MODELS["gan"].scaled(0.5).inputs == ((8, 1, 1, 100), (8, 64, 64, 3))
    assert MODELS["gan"].scaled(0.001).inputs == ((1, 1, 1, 100), (1, 64, 64, 3))
    case = family.Models(0.25).case("tcn", "inference", "float32", "channels_last", None, ["lax"])
    assert case.description == "1x4096x16"
    case = family.Models().case("tcn", "inference", "float32", "channels_last", 2, ["lax"])
    assert case.description == "2x4096x16"


@pytest.mark.full
def test_models_on_the_command_line(tmp_path, monkeypatch, native, capsys):
    monkeypatch.setitem(family.MODELS, "tcn", _tiny("tcn"))
    path = tmp_path / "models.json"
    arguments = ["--models", "tcn", "--rounds", "3", "--seconds", "0.01", "--json", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    report = json.loads(path.read_text())
    assert [result["op"] for result in report["results"]] == ["train_step", "inference"]
    for result in report["results"]:
        assert set(result["first_calls"]) == {"native", "lax"}
        assert {"native", "lax"} <= set(result["timings"])
    out = capsys.readouterr().out
    assert "first call, s" in out
    assert cli.main(["bench", "--markdown", str(path)]) == 0
    markdown = capsys.readouterr().out
    assert "| tcn | inference |" in markdown
    assert "first call, s, ours (stock)" in markdown


@pytest.mark.parametrize("option", [("--dtypes", "float16"), ("--layouts", "channels_first")])
def test_models_have_two_types_and_channels_last(option, native, capsys):
    assert cli.main(["bench", "--models", "tcn", *option]) == 2
    assert "the networks are float32 or bfloat16, channels last" in capsys.readouterr().err
