"""Everything that depends on the JAX version, and the few private JAX names that have no public one.

One code base serves JAX 0.4.34 to 0.12. What the older ones cannot do, whatever the library:

| JAX | lacks | what happens |
|---|---|---|
| before 0.6 | `jax.shard_map` | the experimental one wants `check_rep=False` and says so; then all works |
| before 0.6 | explicit sharding | there is no such mesh; its tests begin where `jax.set_mesh` does |
| before 0.7 | Shardy | a mesh that is manual in part gathers over its other axes; results are right |
| before 0.8 | partitioned custom calls on explicit meshes | `jit` over sharded arrays runs StableHLO |
| before 0.6 | `jax.export` without absl-py | `ImportError`, there and for symbolic shapes, no earlier |
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.core import (
    InconclusiveDimensionOperation,  # no public name since JAX 0.11
    trace_state_clean,  # any array would tell too, but starts the devices
)
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.interpreters import ad, mlir

try:
    from jax import export
except ImportError:  # before JAX 0.6 it needs absl-py, which JAX does not depend on
    export = None  # type: ignore[assignment]

try:
    from jax import ffi  # JAX >= 0.5.0
except ImportError:
    from jax.extend import ffi

try:
    from jax.experimental.custom_partitioning import custom_partitioning as _custom_partitioning
except ImportError:  # experimental modules come and go
    _custom_partitioning = None  # type: ignore[assignment, misc]

try:
    from jax.experimental import jet as _jet
except ImportError:  # experimental modules come and go
    _jet = None  # type: ignore[assignment]

__all__ = [
    "HAS_SHARDING_RULES",
    "Primitive",
    "call_native",
    "can_partition",
    "define_jet",
    "ffi_api_minor",
    "for_export",
    "is_symbolic",
    "lower_partitioned",
    "lower_plainly",
    "max_dim",
    "min_dim",
    "no_terms",
    "platforms",
    "register_target",
    "retyped",
    "runs_whole_arrays",
    "sharded_like",
    "sharding_of",
    "symbolic_below",
    "take_along_axis",
    "vary_alike",
    "warn_if_untested",
    "zero_tangent",
]

from jax.extend.core import Primitive

# --- versions -----------------------------------------------------------------------------------------

NEWEST_TESTED = (0, 12)
"""The newest JAX, without the patch, that the tests run on: the last rows of `.ci/versions`."""


def warn_if_untested(version: tuple[int, ...]) -> None:
    """Warns of a JAX that is newer than the newest tested."""
    if version[:2] > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"jax_mps was tested on JAX up to {newest}, and this is JAX {'.'.join(map(str, version))}. "
            "Most things should work; look for a newer jax_mps if something does not.",
            stacklevel=2,
        )


warn_if_untested(jax.__version_info__)

# --- symbolic dimensions ------------------------------------------------------------------------------

max_dim, min_dim = jax.core.max_dim, jax.core.min_dim


def is_symbolic(dim: Any) -> bool:
    return export is not None and bool(export.is_symbolic_dim(dim))


def symbolic_below(value: Any, bound: int) -> bool:
    """Whether `value < bound` for every value of its symbols; false where that cannot be decided."""
    try:
        return bool(value < bound)
    except InconclusiveDimensionOperation:
        return False


# --- gathers ------------------------------------------------------------------------------------------


def take_along_axis(x: Any, indices: Any, axis: int) -> Any:
    """`jnp.take_along_axis` for indices in bounds, of the size of `x` or 1 along the other axes."""
    if jax.__version_info__ < (0, 4, 38) and 0 in x.shape:  # refused there
        return jnp.zeros((*x.shape[:axis], indices.shape[axis], *x.shape[axis + 1 :]), x.dtype)
    return jnp.take_along_axis(x, indices, axis=axis, mode="promise_in_bounds")


# --- shard_map ----------------------------------------------------------------------------------------


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """Marks every array as varying over the union of the manual mesh axes that any of them varies over.

    Without this a replicated operand beside a sharded one loses the sum over devices in its gradient:
    the transpose of the mark is that sum. Does nothing outside `shard_map`, and before JAX 0.6, whose
    `shard_map` does not track what varies through primitives of other libraries.
    """
    if len(arrays) < 2 or _vary is None:
        return arrays
    varying = [_varying(a) for a in arrays]
    union = frozenset().union(*varying)
    return tuple(_vary(a, tuple(union - v)) if union - v else a for a, v in zip(arrays, varying, strict=True))


# pvary is for JAX 0.6 and 0.7; before there was neither.
_vary: Callable[[Any, tuple[str, ...]], Any] | None = (
    functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else getattr(lax, "pvary", None)
)


def _varying(array: Any) -> frozenset[str]:
    aval = jax.typeof(array)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


# --- types --------------------------------------------------------------------------------------------


def retyped(
    aval: Any,
    shape: tuple[Any, ...],
    dtype: Any,
    origin: Sequence[int | None] | None = None,
    also: Mapping[int, Any] | None = None,
) -> Any:
    """The type `aval` with another shape and dtype; its sharding and what it varies over stay.

    On an explicit mesh an axis whose new length the mesh does not divide is no longer sharded.

    Args:
      aval: the type to start from.
      shape: the new shape.
      dtype: the new dtype.
      origin: for each new axis the axis of `aval` whose sharding it takes, or None for no sharding; each
        its own if left out.
    """
    if type(aval).__name__ == "ConcreteArray":  # eager linearisation before JAX 0.4.36
        aval = jax.core.raise_to_shaped(aval)
    changes: dict[str, Any] = {"shape": shape, "dtype": dtype, "weak_type": False}
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and not sharding.mesh.empty and (origin is not None or any(sharding.spec)):
        old = list(
            sharding.spec if origin is None else [None if i is None else sharding.spec[i] for i in origin]
        )
        for i, names in (also or {}).items():
            taken = {a for other in old if other is not None for a in _names(other)}
            if names is not None and taken.isdisjoint(_names(names)):
                old[i] = names
        spec = [
            names
            if names is None or n % math.prod(sharding.mesh.shape[a] for a in _names(names)) == 0
            else None
            for n, names in zip(shape, old, strict=True)
        ]
        changes["sharding"] = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return aval.update(**changes)


def sharding_of(aval: Any, axis: int) -> tuple[Any, int]:
    """How an axis is sharded on an explicit mesh: the names of mesh axes, or None, and how many parts."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty or not sharding.spec or sharding.spec[axis] is None:
        return None, 1
    names = sharding.spec[axis]
    return names, math.prod(sharding.mesh.shape[a] for a in _names(names))


def _names(names: Any) -> tuple[Any, ...]:
    return names if isinstance(names, tuple) else (names,)


def sharded_like(aval: Any, x: Any) -> Any:
    """`x` with the sharding that the type `aval` has on an explicit mesh."""
    wanted = getattr(aval, "sharding", None)
    if wanted is None or wanted.mesh.empty or jax.typeof(x).sharding == wanted:
        return x
    return jax.sharding.reshard(x, wanted)


def zero_tangent(x: Any) -> ad.Zero:
    """The tangent of something that does not depend on what is being differentiated."""
    aval = jax.typeof(x) if hasattr(jax, "typeof") else jax.core.get_aval(x)
    return ad.Zero(aval.to_tangent_aval())


# --- Taylor series ------------------------------------------------------------------------------------

jet: Any = _jet

no_terms = getattr(jet, "zero_series", None)
"""The terms of a result that does not depend on what is being differentiated."""

# Before JAX 0.5 the terms that rules see are derivatives.
_TERMS_ARE_DERIVATIVES = jet is not None and "factorial_scaled" not in inspect.signature(jet.jet).parameters


def define_jet(primitive: Any, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Registers the rule of `jax.experimental.jet`.

    Args:
      primitive: what it is for.
      rule: the function of (operands, terms of each operand, **params) that gives the result and its terms,
        which are coefficients of Taylor series from the first order on.
    """
    if jet is None:
        return

    def of_derivatives(primals: Any, series: Any, **params: Any) -> tuple[Any, Any]:
        series = [[t / math.factorial(k) for k, t in enumerate(terms, 1)] for terms in series]
        out, terms = rule(primals, series, **params)
        return out, terms if terms is no_terms else [t * math.factorial(k) for k, t in enumerate(terms, 1)]

    # The one rule of several results is linear, whatever the terms are.
    scaled = _TERMS_ARE_DERIVATIVES and not primitive.multiple_results
    jet.jet_rules[primitive] = of_derivatives if scaled else rule


# --- lowering -----------------------------------------------------------------------------------------


def platforms(ctx: mlir.LoweringRuleContext) -> Sequence[str]:
    """The platforms that the code of this lowering is for."""
    return getattr(ctx, "platforms", None) or ctx.module_context.platforms


def for_export(ctx: mlir.LoweringRuleContext) -> bool:
    return bool(getattr(ctx.module_context.lowering_parameters, "for_export", True))


def runs_whole_arrays(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the arrays of this lowering are what one device sees, so that nothing partitions them."""
    axes = ctx.module_context.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is not None:
        return bool(devices == 1)
    mesh = getattr(axes, "mesh", None)
    if mesh is not None:
        return mesh.size == 1 or frozenset(mesh.axis_names) == frozenset(axes.manual_axes)
    return type(axes).__name__ == "ReplicaAxisContext"  # pmap before JAX 0.8


def lower_plainly(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering rule that traces `fun` on arrays without sharding types.

    The primitive's own rule has already typed the result. Inside, a reshape that splits a sharded axis
    would be refused on an explicit mesh, and constants would need marks in `shard_map`; the compiler's
    partitioner needs neither.
    """
    rule = mlir.lower_fun(fun, multiple_results=False)
    rules = mlir.lower_fun(fun, multiple_results=True)

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        avals = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
        chosen = rules if ctx.primitive is not None and ctx.primitive.multiple_results else rule
        if not hasattr(jax.sharding, "use_abstract_mesh"):
            return chosen(ctx.replace(avals_in=avals), *operands, **params)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            avals = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
            return chosen(ctx.replace(avals_in=avals), *operands, **params)

    return lower


# --- several devices ----------------------------------------------------------------------------------

HAS_SHARDING_RULES = (
    _custom_partitioning is not None
    # Before, what a device computes of a program on an explicit mesh still had that mesh.
    and jax.__version_info__ >= (0, 8)
    and bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
)
"""Whether custom calls can say how they are cut."""


def can_partition(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether `lower_partitioned` can serve: nothing is manual, and Shardy partitions."""
    devices = getattr(ctx.module_context.axis_context, "num_devices", None)
    return (
        HAS_SHARDING_RULES
        and bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
        and devices is not None
        and devices <= len(jax.devices("cpu"))
    )


def lower_partitioned(
    ctx: mlir.LoweringRuleContext,
    fun: Callable[..., Any],
    description: str,
    sharding_rule: tuple[str, dict[str, Any]],
    plan: Callable[..., tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]],
    *operands: Any,
) -> Any:
    """Lowers a function so that the partitioner asks how to cut it.

    Args:
      ctx: of the lowering.
      fun: the function of the operands.
      description: tells it from every other function.
      sharding_rule: an `einsum` of factors, and the keywords that belong to it.
      plan: the function of (mesh, operands, results) that gives what a device computes of its blocks, and
        the specs of operands and results. `mesh` has the length of each axis; of each array there are the
        shape, the dtype, and for each axis the names of the mesh axes that cut it.
      operands: of the lowering.
    """
    axes: Any = ctx.module_context.axis_context
    # A program does not depend on which devices they are, but JAX wants some.
    devices = tuple(jax.devices("cpu")[: axes.num_devices])
    axes = dataclasses.replace(axes, device_assignment=devices)
    ctx = ctx.replace(module_context=ctx.module_context.replace(axis_context=axes))

    def partition(_: Any, arguments: Any, result: Any) -> Any:
        results, tree = jax.tree.flatten(result)
        arrays = [*arguments, *results]
        mesh, specs = _decoded(devices, arrays)
        described = [(tuple(x.shape), x.dtype, spec) for x, spec in zip(arrays, specs, strict=True)]
        n = len(arguments)
        local, ins, outs = plan(dict(mesh.shape), described[:n], described[n:])

        def placed(spec: Any) -> Any:
            names = (axis_names or None for axis_names in spec)
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

        types = tuple(
            (
                tuple(
                    -(-n // math.prod(mesh.shape[a] for a in axes))
                    for n, axes in zip(x.shape, spec, strict=True)
                ),
                x.dtype,
            )
            for x, spec in zip(results, outs, strict=True)
        )
        return (
            mesh,
            lambda *parts: tree.unflatten(_part_p.bind(*parts, function=local, types=types)),
            tree.unflatten([placed(spec) for spec in outs]),
            tuple(placed(spec) for spec in ins),
        )

    partitioned = _custom_partitioning(fun)
    text, keywords = sharding_rule
    # Shardings are decoded here: the user's mesh is not known, and its axes may be cut in part.
    partitioned.def_partition(partition, decode_shardings=False, sharding_rule=text, **keywords)
    results = lower_plainly(partitioned)(ctx, *operands)
    # The call has the address of `partition` alone, and a cache of programs must tell calls apart.
    call = jax.tree.leaves(results)[0].owner
    attributes: dict[str, Any] = {"jax_mps": mlir.ir.StringAttr.get(description)}
    call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(attributes)
    return results


# What one device computes: lowered without the mesh of `jax.set_mesh`, whose axes are not there any more.
_part_p = Primitive("jax_mps_part")
_part_p.multiple_results = True
_part_p.def_abstract_eval(lambda *_, function, types: [jax.core.ShapedArray(*t) for t in types])


def _lower_part(ctx: mlir.LoweringRuleContext, *parts: Any, function: Callable[..., Any], types: Any) -> Any:
    return lower_plainly(function)(ctx, *parts)


mlir.register_lowering(_part_p, _lower_part)


def _decoded(devices: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A mesh whose axes have prime lengths, and for each axis of each array the mesh axes that cut it.

    Every mesh of the user, and every part of its axes, consists of such axes in some order.
    """
    meshes = [
        jax.sharding.Mesh(np.array(devices).reshape(lengths), [f"axis{i}" for i in range(len(lengths))])
        for lengths in _orders(_prime_factors(len(devices)))
    ]
    each = [(mesh, [_spec(x, mesh) for x in arrays]) for mesh in meshes]
    mesh, specs = min(each, key=lambda found: found[1].count(None))
    return mesh, [spec or ((),) * x.ndim for x, spec in zip(arrays, specs, strict=True)]


def _orders(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """The different orders of numbers, some of which may be equal."""
    if not numbers:
        return [()]
    rests = {n: [*numbers[:i], *numbers[i + 1 :]] for i, n in enumerate(numbers)}
    return [(n, *rest) for n in sorted(rests) for rest in _orders(rests[n])]


def _prime_factors(n: int) -> list[int]:
    p = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [] if n == 1 else [p, *_prime_factors(n // p)]


def _spec(x: Any, mesh: Any) -> tuple[tuple[str, ...], ...] | None:
    """For each axis of an array the mesh axes that cut it; None where this mesh cannot say it."""
    spec: Any = ()
    if x.sharding is not None:
        try:
            (spec,) = parse_flatten_op_sharding(x.sharding._to_xla_hlo_sharding(x.ndim), mesh)
        except (ArithmeticError, AssertionError, LookupError, NotImplementedError, ValueError):
            return None
    names = [() if n is None else _names(n) for n in spec]
    return (*names, *[()] * (x.ndim - len(names)))


# --- foreign functions --------------------------------------------------------------------------------


def call_native(ctx: mlir.LoweringRuleContext, target: str, *operands: Any, **attributes: Any) -> Any:
    return ffi.ffi_lowering(target)(ctx, *operands, **attributes)


def register_target(name: str, function: Any) -> None:
    ffi.register_ffi_target(name, ffi.pycapsule(function), platform="cpu")


@functools.cache
def ffi_api_minor() -> int:
    """The minor version of the FFI API that the installed jaxlib speaks."""
    header = Path(ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    match = re.search(r"#define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    return int(match.group(1)) if match else 0


# --- stock primitives ---------------------------------------------------------------------------------


class StockRules:
    """The lowering rules that JAX has for its own primitives, and others in their place.

    There is a table for each platform; the platform None has the rules of all that have none of their own.

    Raises:
      RuntimeError: this JAX keeps its rules elsewhere.
    """

    def __init__(self) -> None:
        try:
            from jax._src.interpreters import mlir as private

            self._tables: dict[str | None, dict[Any, Any]] = {
                "cpu": private._platform_specific_lowerings["cpu"],
                "cuda": private._platform_specific_lowerings["cuda"],
                None: private._lowerings,
            }
            self._uncacheable: set[Any] = getattr(private, "_uncacheable_primitives", set())
        except (ImportError, AttributeError, KeyError) as error:
            raise RuntimeError(
                f"accelerate() does not know JAX {jax.__version__}, which keeps its lowering rules elsewhere "
                f"({error}); nothing was replaced"
            ) from error
        self._saved: dict[tuple[str | None, Any], Any] = {}
        self._placed: dict[tuple[str | None, Any], Any] = {}

    def stock(self, primitive: Any, platform: str | None) -> Callable[..., Any]:
        """The rule that JAX itself has; to be asked before it is replaced."""
        entry: Any = self._tables[platform].get(primitive) or self._tables[None].get(primitive)
        if entry is None:
            raise RuntimeError(
                f"accelerate() does not know JAX {jax.__version__}, which has no rule for {primitive}; "
                "nothing was replaced"
            )
        return getattr(entry, "rule", entry)

    def replace(self, primitive: Any, platform: str | None, rule: Callable[..., Any]) -> None:
        """Puts a rule in place."""
        key, table = (platform, primitive), self._tables[platform]
        self._saved[key] = table.get(primitive)
        mlir.register_lowering(primitive, rule, platform=platform)
        self._placed[key] = table[primitive]
        # A cached rule does not see which operations made its operands.
        self._uncacheable.add(primitive)

    @property
    def in_place(self) -> bool:
        return bool(self._saved)

    def restore(self) -> None:
        """Puts JAX's own rules back, except where another library has replaced ours since and calls them."""
        for (platform, primitive), entry in self._saved.items():
            table = self._tables[platform]
            if table.get(primitive) is not self._placed[platform, primitive]:
                continue
            self._uncacheable.discard(primitive)
            if entry is None:
                del table[primitive]
            else:
                table[primitive] = entry
        self._saved.clear()
        self._placed.clear()


class Switch:
    """A value for the whole process that programs are compiled for: another one compiles them again."""

    def __init__(self) -> None:
        # Part of the keys of JAX's caches from JAX 0.9 on; before, caches are cleared.
        make = getattr(jax, "make_user_context", None)
        context = make(False) if make is not None else None
        # The first ones, of JAX 0.8, have no value for the whole process.
        self._context = context if hasattr(context, "set_global") else None
        self._value = False

    @property
    def value(self) -> bool:
        return bool(self._value if self._context is None else self._context.value)

    def set(self, value: bool) -> None:
        if self._context is not None:
            self._context.set_global(value)
        elif value != self._value:
            self._value = value
            jax.clear_caches()


def _maker(value: Any, name: str) -> Any:
    """The StableHLO operation that made a value while lowering, if it is known and has that name."""
    operation = getattr(value, "owner", None)
    operation = getattr(operation, "operation", operation)
    return operation if getattr(operation, "name", None) == name else None


def reversed_operand(value: Any) -> tuple[Any, set[int]] | None:
    """If a value is a reversal: of what, and of which axes."""
    operation = _maker(value, "stablehlo.reverse")
    if operation is None:
        return None
    return operation.operands[0], {int(i) for i in operation.attributes["dimensions"]}


def padded_operand(value: Any) -> tuple[Any, tuple[int, ...], list[tuple[int, int, int]]] | None:
    """If floats are padded with zeros: of what, of which shape, and `(low, high, interior)` for each axis."""
    operation = _maker(value, "stablehlo.pad")
    if operation is None:
        return None
    operand, fill = operation.operands
    while (spread := _maker(fill, "stablehlo.broadcast_in_dim")) is not None:
        fill = spread.operands[0]
    constant = _maker(fill, "stablehlo.constant")
    # NumPy reads no attribute of bfloat16.
    if constant is None or constant.attributes["value"].get_splat_value().value != 0:
        return None
    names = ("edge_padding_low", "edge_padding_high", "interior_padding")
    columns = ([int(n) for n in operation.attributes[name]] for name in names)
    return operand, tuple(operand.type.shape), list(zip(*columns, strict=True))


def is_tracing() -> bool:
    """Whether JAX is tracing a function in this thread."""
    return not trace_state_clean()
