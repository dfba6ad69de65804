"""The switch: rules for stock primitives, put in place on request and taken back."""

from __future__ import annotations

import dataclasses
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jax_mps import _compat
from jax_mps.lowering import library, rule
from jax_mps.ops.operands import FLOATS
from jax_mps.stock import apple, convolution, windows
from jax_mps.stock.choices import Reading, choose
from jax_mps.stock.report import Report, Row, type_name

__all__ = ["Acceleration", "accelerate"]

_lock = threading.RLock()
_active: list[Acceleration] = []
_switch: _compat.Switch | None = None
_rules: _compat.StockRules | None = None
# Our StableHLO is made of stock operations, which are meant as they are.
_inside = threading.local()


class Acceleration:
    """What `accelerate()` returns: a handle, and a context manager that restores at its end."""

    def __init__(self) -> None:
        self._report = Report()

    def restore(self) -> None:
        """Ends this acceleration: when none is left, stock programs are JAX's own again."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _turn_off()

    def report(self) -> Report:
        """What was lowered since this handle was made: operation, types, whose code, and why."""
        return self._report

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.restore()


def accelerate() -> Acceleration:
    """Makes stock JAX programs of this process use the operations of this library.

    From this call on, programs that JAX lowers have their ordinary and transposed convolutions, their
    gradients, their windowed maxima, minima and sums and the gradients of these replaced:

    | platform | by | where |
    |---|---|---|
    | CPU: one device, or a `shard_map` over all axes | native kernels | they are faster |
    | CUDA | StableHLO | it is faster |
    | Apple's plugins, METAL and mps | StableHLO of what all plugins have | always |

    Nothing in the model changes: gradients, `vmap`, `scan`, `remat` work as before, for the replacement is
    made when a program is lowered.

        y = conv_general_dilated(x, kernel)    becomes    y = conv_transpose_gradient_data(x, kernel)

    Results are those of stock JAX up to rounding; half precision is summed in float32 and rounded once. In
    reverse mode, NaN and ties of maxima are treated as stock JAX treats them. In forward mode the order in
    which XLA compares equal maxima depends on the shape; ours is row-major.

    Calls may be nested and made from any thread; the last handle that is restored turns the replacement
    off. Programs that were compiled before are compiled again, with JAX 0.9 and newer since the switch is
    part of the keys of JAX's caches. On older versions what JAX has compiled is forgotten each time the
    switch turns.

    Returns:
      A handle: `restore()` ends it, `with` restores at the end, `report()` says what was lowered, by whose
      code, and why. Without the native library nothing is replaced on the CPU, and a warning says so.

    Raises:
      RuntimeError: called while JAX traces a function; JAX keeps its lowering rules elsewhere than any
        known version (nothing is replaced then); or the environment says `JAX_MPS_NATIVE=required` and the
        library cannot be used.

    Examples:
      >>> import jax, jax.numpy as jnp, jax_mps
      >>> image, kernel = jnp.ones((1, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
      >>> def loss(kernel):
      ...     return jax.lax.conv_general_dilated(
      ...         image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()
      >>> with jax_mps.accelerate() as handle:
      ...     gradient = jax.grad(loss)(kernel)
      >>> gradient.shape, len(handle.report()) > 0 or not jax_mps.native_available()
      ((3, 3, 16, 16), True)

    Source: the primitives of `jax.lax`; the switch follows scikit-learn-intelex's `patch_sklearn`.
    """
    if _compat.is_tracing():
        raise RuntimeError(
            "accelerate() was called while JAX traces a function; call it before, outside of jit and grad"
        )
    handle = Acceleration()
    with _lock:
        status = library.status()
        if not status.available:
            warnings.warn(f"accelerate() replaces nothing on the CPU: {status.reason}", stacklevel=2)
        if not _active:
            _turn_on()
        _active.append(handle)
    return handle


def _turn_on() -> None:
    global _switch, _rules
    rules = _compat.StockRules()
    platforms = (*(["cpu"] if library.status().available else []), "cuda", None)
    replacements = [
        (primitive, platform, _rule(rules, primitive, platform, read))
        for platform in platforms
        for primitive, read in (_READERS if platform else _APPLE_READERS).items()
    ]
    _switch, _rules = _switch or _compat.Switch(), rules
    for replacement in replacements:
        rules.replace(*replacement)
    _switch.set(True)


def _turn_off() -> None:
    assert _switch is not None
    assert _rules is not None
    _switch.set(False)
    _rules.restore()


# --- from a primitive to a reading --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """A stock operation while it is lowered: its operands, their types, and how to read them."""

    reading: Any  # a `Reading`, or the reason why there is none
    operands: Sequence[Any]
    avals: Sequence[Any]


def _convolution(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> _Call:
    spatial = set(params["dimension_numbers"].rhs_spec[2:])
    before = _compat.reversed_operand(rhs)
    known = before is not None and before[1] == spatial
    (first, second), (out,) = ctx.avals_in, ctx.avals_out
    reading = convolution.recognise(first, second, out, params, known)
    if before is not None and isinstance(reading, convolution.Reading) and reading.unreversed:
        rhs = before[0]
    return _Call(reading, (lhs, rhs), ctx.avals_in)


def _sum(ctx: Any, x: Any, **params: Any) -> _Call:
    (aval,), (out,) = ctx.avals_in, ctx.avals_out
    readable = (
        aval.dtype.name in FLOATS
        and all(pad == (0, 0) for pad in params["padding"])
        and all(b == 1 for b in params["base_dilation"])
    )
    padded = _compat.padded_operand(x) if readable else None
    if padded is not None:
        operand, shape, config = padded
        before = jax.ShapeDtypeStruct(shape, aval.dtype)
        reading = windows.recognise_sum(aval, out, params, (before, config))
        if isinstance(reading, windows.Reading):
            return _Call(reading, (operand,), (before,))
    return _Call(windows.recognise_sum(aval, out, params), (x,), ctx.avals_in)


def _plain(read: Callable[..., Reading | str]) -> Callable[..., _Call]:
    def call(ctx: Any, *operands: Any, **params: Any) -> _Call:
        return _Call(read(*ctx.avals_in, *ctx.avals_out, params), operands, ctx.avals_in)

    return call


_READERS: dict[Any, Callable[..., _Call]] = {
    lax.conv_general_dilated_p: _convolution,
    lax.reduce_window_max_p: _plain(windows.recognise_max),
    lax.reduce_window_min_p: _plain(windows.recognise_min),
    lax.reduce_window_sum_p: _sum,
    lax.select_and_scatter_add_p: _plain(windows.recognise_scatter),
    lax.select_and_gather_add_p: _plain(windows.recognise_gather),
}


_APPLE_READERS = _READERS | {lax.rev_p: _plain(apple.recognise_rev), lax.pad_p: _plain(apple.recognise_pad)}


def _rule(
    rules: _compat.StockRules, primitive: Any, platform: str | None, read: Callable[..., _Call]
) -> Callable[..., Any]:
    """The rule for a platform: ours where the switch is on and the operation is recognised, or the stock one.

    That of None is for Apple's plugins; other platforms without rules of their own keep the stock one.
    """
    stock = rules.stock(primitive, platform)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        # A second copy of this library may have kept a rule of an earlier turn, to call as the stock one.
        if not rules.in_place or _switch is None or not _switch.value:
            return stock(ctx, *operands, **params)
        target = rule.platform_of(ctx)
        if (platform is None and target != "apple") or getattr(_inside, "value", False):
            return stock(ctx, *operands, **params)
        ours, why = False, _obstacle(ctx, target)
        if not why:
            call = read(ctx, *operands, **params)
            if isinstance(call.reading, str):
                why = call.reading
            else:
                ours, why = choose(call.reading, target)
        _record(primitive, ctx, ours, why)
        if not ours:
            return stock(ctx, *operands, **params)
        _inside.value = True
        try:
            return _compat.lower_plainly(call.reading)(ctx.replace(avals_in=call.avals), *call.operands)
        finally:
            _inside.value = False

    return lower


def _obstacle(ctx: Any, platform: rule.Platform) -> str:
    """Why nothing can be replaced here; empty if it can."""
    if platform == "cpu":
        return rule.obstacle(ctx)
    if platform == "any":
        return "a program for several platforms"
    avals = (*ctx.avals_in, *ctx.avals_out)
    if any(_compat.is_symbolic(d) for aval in avals for d in aval.shape):
        return "shapes are symbolic"
    if platform == "apple" and any(aval.dtype.itemsize == 8 for aval in avals):
        return "Apple's GPUs have no 64-bit numbers"
    return ""


def _record(primitive: Any, ctx: Any, ours: bool, why: str) -> None:
    row = Row(primitive.name, tuple(map(type_name, ctx.avals_in)), type_name(ctx.avals_out[0]), ours, why)
    with _lock:
        for handle in _active:
            handle.report().add(row)
