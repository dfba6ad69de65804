"""PyTorch's own samples of poolings and convolutions, and the inputs that it refuses.

Values, indices and first derivatives in all types of the samples; tangents and second derivatives in float64.
References are computed in float64 from the same numbers, but for integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
import oracle
import peers
import stock_calls

torch = pytest.importorskip("torch")

import torch_samples  # noqa: E402
from torch_samples import Sample  # noqa: E402

FLOATS = ("bfloat16", "float16", "float32", "float64")
INTEGERS = ("int16", "int32", "int64", "int8", "uint8")
COMPLEX = ("complex64", "complex128")
RANKS = (1, 2, 3)
TYPES = {
    **{f"adaptive_{kind}_pool{rank}d": FLOATS for kind in ("avg", "max") for rank in RANKS},
    **{f"avg_pool{rank}d": FLOATS for rank in (1, 2)},
    "avg_pool3d": FLOATS[2:],
    **{f"{name}{rank}d": FLOATS + COMPLEX for name in ("conv", "conv_transpose") for rank in RANKS},
    **{f"fractional_max_pool{rank}d": FLOATS for rank in (2, 3)},
    **{f"lp_pool{rank}d": FLOATS[2:] for rank in RANKS},
    "max_pool1d": FLOATS,
    **{f"max_pool{rank}d": FLOATS + INTEGERS for rank in (2, 3)},
    "max_pool2d_with_indices_backward": FLOATS,
    **{f"max_unpool{rank}d{variant}": FLOATS for rank in RANKS for variant in ("", "-grad")},
}
"""All that PyTorch has, with the types that it has and we have."""

REFUSED = {
    **{f"avg_pool{rank}d": "an average of integers is no integer" for rank in RANKS},
    **{f"conv{rank}d": "the library has convolutions of floats" for rank in RANKS},
    **{f"conv_transpose{rank}d": "the library has convolutions of floats" for rank in RANKS},
}
"""What takes int64 in PyTorch and raises a `TypeError` here."""

PARTS = {"max_pool2d": 8, "max_pool2d_with_indices_backward": 4, "max_pool3d": 6}
"""Into how many tests an operation's calls go, so that each is short."""

CASES = [
    (name, dtype, part)
    for name, dtypes in TYPES.items()
    for dtype in dtypes
    for part in range(PARTS.get(name, 1))
]

Results = dict[str, Any]
EXACT = ("max_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool")
"""Functions whose values are pixels."""


@functools.cache
def ops() -> dict[str, torch_samples.Op]:
    """PyTorch's table takes seconds to import."""
    return {str(op): op for op in torch_samples.ops()}


def calls_of(name: str, dtype: str, part: int) -> list[Sample]:
    """Samples of a part. Of poolings and unpoolings, images of one size and one call are one sample.

    A program for each image would take its compiler ten times as long.
    """
    op = ops()[name]
    samples = op.samples(dtype)
    if not op.name.startswith("conv"):
        alike: dict[Any, list[Sample]] = {}
        for sample in samples:
            key = sample.call, sample.channels_last, sample.operands[0].shape[-op.rank - 1 :]
            alike.setdefault(key, []).append(sample)
        samples = [joined(members) for members in alike.values()]
    return samples[part :: PARTS.get(name, 1)]


def joined(samples: Sequence[Sample]) -> Sample:
    """Samples as one, whose images are those of all."""

    most = max(sample.operands[0].ndim for sample in samples)
    alone = [sample.operands[0].ndim < most for sample in samples]

    def join(tensors: Sequence[Any]) -> Any:
        return torch.cat([x[None] if single else x for x, single in zip(tensors, alone, strict=True)])

    def join_all(several: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(map(join, zip(*several, strict=True)))

    return samples[0]._replace(
        operands=join_all([sample.operands for sample in samples]),
        constants=join_all([sample.constants for sample in samples]),
    )


# --- PyTorch's results --------------------------------------------------------------------------------


def expected(sample: Sample, dtype: str) -> tuple[Results, Results]:
    """The arrays that `derivatives` takes, and what PyTorch makes of them in float64."""
    kind = getattr(torch, dtype)
    arrays: Results = {"operands": arrays_of(sample.operands), "constants": arrays_of(sample.constants)}
    floating = kind.is_floating_point or kind.is_complex
    wide = (torch.complex128 if kind.is_complex else torch.float64) if floating else kind
    operands = [x.to(wide).requires_grad_(floating) for x in sample.operands]
    y, *others = results(sample.reference(*operands, *sample.constants))
    found: Results = {"value": torch_samples.array(y), "others": arrays_of(others)}
    # PyTorch has no gradient of integers, and `max_pool2d_with_indices_backward` for one cotangent alone.
    if not floating or sample.call.name == "max_pool_gradient":
        return arrays, found
    if sample.call.name == "max_unpool":
        y = unpooled_from_last(y, operands[0], sample.constants[0])
    g = torch.randn(y.shape, dtype=kind)
    arrays["cotangent"] = torch_samples.array(g.conj().resolve_conj())  # PyTorch's gradients are conjugates
    gradient = torch.autograd.grad(y, operands, g.to(wide), create_graph=True)
    found["gradient"] = tuple(x.conj() for x in arrays_of(gradient))
    if dtype == "float64":
        t = [torch.randn_like(x) for x in operands]
        arrays["tangents"] = arrays_of(t)
        u = torch.zeros_like(y, requires_grad=True)
        pull_back = torch.autograd.grad(y, operands, u, create_graph=True)
        (tangent,) = torch.autograd.grad(pull_back, u, t)
        found["tangent"] = torch_samples.array(tangent)
        gradient = torch.autograd.grad((g * y**2).sum(), operands, create_graph=True)
        found["second"] = arrays_of(torch.autograd.grad(gradient, operands, t))
    return arrays, found


def arrays_of(tensors: Sequence[Any]) -> tuple[np.ndarray, ...]:
    return tuple(map(torch_samples.array, tensors))


def results(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def unpooled_from_last(y: Any, x: Any, at: Any) -> Any:
    """What unpooling is by design: of entries with one index the last one stays, and has the gradient.

    PyTorch gives the gradient to each of them, which is not the derivative of what it computes.
    """
    rank = y.ndim - 2
    values, places = x.flatten(-rank), at.flatten(-rank)
    later = torch.ones(2 * places.shape[-1:], dtype=torch.bool).triu(1)
    last = ~((places[..., :, None] == places[..., None, :]) & later).any(-1)
    plane = torch.zeros_like(y).flatten(-rank)
    return plane.scatter_add(-1, places, values * last).reshape(y.shape)


# --- ours ---------------------------------------------------------------------------------------------


def derivatives(function: Callable[..., tuple[Any, ...]], arrays: Results) -> Results:
    """What is compared, of a function of operands whose first result is differentiable."""
    operands = arrays["operands"]

    def first(*operands: Any) -> tuple[Any, tuple[Any, ...]]:
        y, *others = function(operands, arrays["constants"])
        return y, tuple(others)

    def squares(*operands: Any) -> Any:
        return (arrays["cotangent"] * first(*operands)[0] ** 2).sum()

    if "cotangent" not in arrays:
        return dict(zip(("value", "others"), first(*operands), strict=True))
    y, pull_back, others = jax.vjp(first, *operands, has_aux=True)
    found = {"value": y, "others": others, "gradient": pull_back(arrays["cotangent"])}
    if "tangents" in arrays:
        gradient = jax.grad(squares, range(len(operands)))
        found["tangent"] = jax.jvp(lambda *x: first(*x)[0], operands, arrays["tangents"])[1]
        found["second"] = jax.jvp(gradient, operands, arrays["tangents"])[1]
    return found


def ours(sample: Sample, implementation: str) -> Callable[..., tuple[Any, ...]]:
    """A function of channels first, which calls ours with channels last where PyTorch has such an image."""
    functions = peers.ours(implementation, "channels_last" if sample.channels_last else "channels_first")

    def function(operands: Any, constants: Any) -> tuple[Any, ...]:
        return torch_samples.apply(sample.call, functions, operands, constants)

    def moved(operands: Any, constants: Any) -> tuple[Any, ...]:
        x, *weights = operands
        images = [jnp.moveaxis(at, -3, -1) for at in constants]
        return tuple(jnp.moveaxis(y, -1, -3) for y in function([jnp.moveaxis(x, -3, -1), *weights], images))

    return moved if sample.channels_last else function


def compare(
    samples: Sequence[Sample],
    dtype: str,
    functions: Sequence[Callable[..., Any]],
    missing: Callable[[Sample], Sequence[str]] = lambda sample: (),
) -> None:
    """Runs functions on arrays of samples in one program, without arrays and results that are `missing`."""
    torch.manual_seed(1)
    wanted = [expected(sample, dtype) for sample in samples]
    for sample, pair in zip(samples, wanted, strict=True):
        for name in missing(sample):
            for results in pair:
                results.pop(name, None)

    @jax.jit
    def program(arrays: list[Results]) -> list[Results]:
        return [derivatives(f, a) for f, a in zip(functions, arrays, strict=True)]

    for sample, found, (_, right) in zip(samples, program([a for a, _ in wanted]), wanted, strict=True):
        check(sample, found, right)


def check(sample: Sample, found: Results, right: Results) -> None:
    length = max(x.numel() for x in sample.operands)  # more than one element has terms
    for name, value in right.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            exact = name == "others" or (name == "value" and sample.call.name in EXACT)
            try:
                if exact:
                    oracle.assert_same(a, b)
                else:
                    close(a, b, length)
            except AssertionError as error:
                shapes = [tuple(x.shape) for x in sample.operands]
                raise AssertionError(f"{name} of {sample.call}, {shapes}{error}") from None


def close(a: Any, b: Any, length: int) -> None:
    if np.iscomplexobj(b):
        assert np.iscomplexobj(a)
        a, b = (np.stack([np.real(x), np.imag(x)]) for x in (a, b))
    oracle.assert_close(a, b, length=length)


# --- the tests ----------------------------------------------------------------------------------------


def test_no_operation_and_no_type_is_left_out() -> None:
    theirs = {name: set(op.dtypes) for name, op in ops().items()}
    refused = {name: {"int64"} if name in REFUSED else set() for name in theirs}
    assert theirs == {name: {*dtypes, *refused[name]} for name, dtypes in TYPES.items()}


# Other tests compare both paths with each other. So one type is enough here for the one that compiles slowly;
# and integers of 64 bits, which have no native kernel.
@pytest.mark.parametrize(
    ("implementation", "name", "dtype", "part"),
    [("native", *case) for case in CASES if case[1] != "int64"]
    + [("xla", *case) for case in CASES if case[1] in ("float32", "int64")],
    indirect=["implementation"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_ours(x64: None, implementation: str, name: str, dtype: str, part: int) -> None:
    samples = calls_of(name, dtype, part)
    compare(samples, dtype, [ours(sample, implementation) for sample in samples])


STOCK = {f"{name}{rank}d" for name in ("avg_pool", "conv", "conv_transpose", "max_pool") for rank in RANKS}
"""Operations that stock JAX has."""


@pytest.mark.parametrize(
    ("name", "dtype", "part"),
    [case for case in CASES if case[0] in STOCK and case[1] == "float32"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_accelerated(native: None, x64: None, name: str, dtype: str, part: int) -> None:
    samples = [
        sample for sample in calls_of(name, dtype, part) if sample.operands[0].numel()
    ]  # empty ones stay stock
    functions = [functools.partial(stock, sample.call) for sample in samples]
    with jax_mps.accelerate() as handle:
        compare(samples, dtype, functions, missing_in_stock)
    assert len(handle.report()) >= len(samples)
    assert all(row.ours for row in handle.report()), handle.report()


def stock(call: torch_samples.Call, operands: Any, constants: Any) -> tuple[Any, ...]:
    keywords = tuple((name, value) for name, value in call.keywords if name != "return_indices")
    return torch_samples.apply(call._replace(keywords=keywords), stock_calls, operands, constants)


def missing_in_stock(sample: Sample) -> Sequence[str]:
    """Indices of maxima, and gradients of dilated ones."""
    dilated = max(dict(sample.call.keywords).get("window_dilation", (1,))) > 1
    return ("others", "cotangent", "gradient") if sample.call.name == "max_pool" and dilated else ("others",)


ACCEPTED = {
    ("avg_pool1d", "pad must be non-negative"): "negative padding crops",
    ("max_pool1d", "pad must be non-negative"): "negative padding crops",
    ("conv3d", "negative padding is not supported"): "negative padding crops",
    (
        "max_pool1d",
        "pad should be at most half of effective kernel size",
    ): "all windows have taps in the image",
    ("conv3d", "padding='same' is not supported for strided convolutions"): "'SAME' is that of TensorFlow",
    (
        "max_pool1d",
        r"Expected 2D or 3D \(batch mode\) tensor",
    ): "without channels there is an empty result",
    (
        "max_pool3d",
        r"Expected input\'s non-batch dimensions",
    ): "without channels there is an empty result",
}
"""What raises in PyTorch alone, and why it has a meaning here."""


def test_what_pytorch_refuses() -> None:
    functions = peers.ours("xla")
    errors = [
        (name, error)
        for name, op in ops().items()
        if getattr(op.info, "error_inputs_func", None) is not None
        for error in op.info.error_inputs("cpu")
    ]
    assert len(errors) > 80
    accepted = set()
    for name, error in errors:
        call, operands, constants = ops()[name].wrong_call(error.sample_input)
        try:
            jax.eval_shape(functools.partial(torch_samples.apply, call, functions), operands, constants)
        except (TypeError, ValueError):
            continue
        known = [key for key in ACCEPTED if key[0] == name and error.error_regex.startswith(key[1])]
        assert known, f"{call} must raise, as in PyTorch: {error.error_regex}"
        accepted.update(known)
    assert accepted == set(ACCEPTED)


@pytest.mark.parametrize("name", REFUSED)
def test_integers_are_refused(x64: None, name: str) -> None:
    for sample in ops()[name].samples("int64"):
        function = ours(sample, "xla")
        with pytest.raises(TypeError, match="must have a dtype of float32"):
            jax.eval_shape(function, arrays_of(sample.operands), ())
