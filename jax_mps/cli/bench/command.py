"""Times named or random shapes beside stock JAX and PyTorch, after checking that all compute the same.

Everyone has a turn in every round, in one process and with as many threads as there are cores; medians
and quartiles of the rounds are kept. The bandwidth of pooling counts what must be moved at least, each
input once and each output once, so it shows how far a kernel is from the limit of the memory, which is
measured too; small shapes that stay in the caches can exceed it. The limit of a transposed convolution is
the rate of `jnp.dot` for matrices of the same M, N and K. A result of 32 MiB or more gets new pages from the
system at every call, which takes milliseconds whoever computes it; `--keep-pages` times without that.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_mps.cli import files, info
from jax_mps.cli.bench import report, runner, training
from jax_mps.cli.bench.conv_transpose import ConvTranspose
from jax_mps.cli.bench.models.family import Models
from jax_mps.cli.bench.networks import Networks
from jax_mps.cli.bench.pooling import Pooling, pooling_case
from jax_mps.cli.bench.random_shapes import random_pooling
from jax_mps.cli.extras import missing
from jax_mps.lowering import library

__all__ = ["add_arguments", "run"]

_FAMILIES: tuple[runner.Family, ...] = (Pooling(), ConvTranspose(), Networks())
_PEERS = ("lax", "torch", "torch_channels_last")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYOUTS = ("channels_last", "channels_first")
_COPY_ELEMENTS = 1 << 25
# Of glibc's malloc.h, for mallopt().
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    shapes = list(dict.fromkeys(name for family in _FAMILIES for name in family.shapes))
    ops = list(dict.fromkeys(name for family in (*_FAMILIES, Models()) for name in family.ops))

    def add(option: str, choices: Sequence[str], default: Sequence[str], text: str, nargs: str = "+") -> None:
        otherwise = "all" if default == choices else " ".join(default)
        parser.add_argument(
            option,
            nargs=nargs,
            choices=choices,
            default=list(default),
            metavar="NAME",  # the usage line would spell out all the choices, twice
            help=f"{text}: {', '.join(choices)} (default: {otherwise})",
        )

    add("--shapes", shapes, shapes, "named shapes")
    add("--ops", ops, ops, "operations")
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--random",
        type=_positive,
        metavar="N",
        help=f"instead of named shapes, that many random poolings and what training runs of them: "
        f"{', '.join(training.OPS)}",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the shapes of --random (default: 0)"
    )
    others.add_argument(
        "--models",
        nargs="*",
        choices=Models.shapes,
        metavar="NAME",
        help="instead of shapes, whole Flax networks: stock, under accelerate(), and in PyTorch: "
        f"{', '.join(Models.shapes)} (default: all)",
    )
    parser.add_argument(
        "--batch-scale", type=float, default=1.0, metavar="X", help="that many times the images of --models"
    )
    add("--dtypes", _DTYPES, ["float32"], "types")
    add("--layouts", _LAYOUTS, ["channels_last"], "layouts of our operands")
    add("--peers", _PEERS, _PEERS, "other libraries, or nothing for none", nargs="*")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=("native", "xla"),
        metavar="NAME",
        help="ours: native, xla; ratios are against the first (default: native if it can be had, else xla)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images, instead of each shape's own number")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of a case (default: 21)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time for a case: fewer rounds if it is slow (default: 5)"
    )
    parser.add_argument(
        "--keep-pages", action="store_true", help="let the C library (glibc) keep freed memory, for everyone"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there, too")
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="time nothing; print that JSON as Markdown"
    )


def run(options: argparse.Namespace) -> int:
    """Times what was selected and prints it."""
    if options.markdown:
        try:
            found = report.Report.load(options.markdown)
        except (OSError, ValueError) as error:
            print(f"jax_mps: cannot read {options.markdown}: {error}", file=sys.stderr)
            return 1
        print(report.markdown(found))
        return 0
    if missing("bench", "rich", *["flax"] * (options.models is not None)):
        return 2
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    native = on_cpu and library.status().available
    implementations = options.implementations or ["native" if native else "xla"]
    if "native" in implementations and not native:
        reason = library.status().reason if on_cpu else f"the device is {device.device_kind}"
        print(f"jax_mps: the native kernels cannot be timed: {reason}", file=sys.stderr)
        return 2
    if options.models is not None and not (
        {*options.dtypes} <= {"float32", "bfloat16"} and options.layouts == ["channels_last"]
    ):
        print("jax_mps: the networks are float32 or bfloat16, channels last", file=sys.stderr)
        return 2
    if options.random and (options.batch or options.layouts != ["channels_last"]):
        print("jax_mps: random shapes have layouts and batches of their own", file=sys.stderr)
        return 2
    if options.keep_pages and not _keep_pages():
        print("jax_mps: --keep-pages needs glibc, which is not this system's C library", file=sys.stderr)
        return 2
    if options.json and not files.writable(options.json):
        return 1
    if "float64" in options.dtypes:
        jax.config.update("jax_enable_x64", True)

    contenders = [*implementations, *options.peers]
    found = report.Report(
        machine=info.machine() if on_cpu else device.device_kind,
        versions=info.versions(*["torch"] * any(name.startswith("torch") for name in contenders)),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        contenders=contenders,
        copy_gbs=_copy_bandwidth(queued=not on_cpu),
        results=[],
        pages_kept=options.keep_pages,
        seed=options.seed if options.random else None,
    )
    try:
        for case in _cases(options, contenders):
            print(case.shape, case.op, case.dtype, case.layout, file=sys.stderr, flush=True)
            found.results.append(
                runner.run(case, rounds=options.rounds, seconds=options.seconds, queued=not on_cpu)
            )
            if options.json and not files.written(
                options.json, found.save
            ):  # at once: a run may be cut short
                return 1
    except runner.Disagreement as disagreement:
        print(f"jax_mps: {disagreement}", file=sys.stderr)
        return 1
    report.print_table(found)
    return 0


def _cases(options: argparse.Namespace, contenders: Sequence[str]) -> Iterator[runner.Case]:
    if options.random:
        return _random_cases(options, contenders)
    return _named_cases(options, contenders)


def _random_cases(options: argparse.Namespace, contenders: Sequence[str]) -> Iterator[runner.Case]:
    for shape, layout in random_pooling(options.random, options.seed):
        for dtype, op in itertools.product(options.dtypes, options.ops):
            if op in training.OPS:
                yield pooling_case(shape, op, dtype, layout, contenders)


def _named_cases(options: argparse.Namespace, contenders: Sequence[str]) -> Iterator[runner.Case]:
    families: Sequence[runner.Family] = _FAMILIES
    shapes = options.shapes
    if options.models is not None:
        families = (Models(options.batch_scale),)
        shapes = options.models or Models.shapes
    for family in families:
        selected = itertools.product(
            options.dtypes,
            options.layouts,
            [name for name in shapes if name in family.shapes],
            [name for name in options.ops if name in family.ops],
        )
        for dtype, layout, shape, op in selected:
            yield family.case(shape, op, dtype, layout, options.batch, contenders)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _keep_pages() -> bool:
    """Makes glibc keep what is freed, up to 2 GiB; False where the C library is another one."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)))


def _copy_bandwidth(*, queued: bool) -> float:
    """The GB/s at which an array larger than the caches is read and written back.

    In place: a fresh result of this size would measure how fast the system hands out pages.
    """
    array = jnp.zeros(_COPY_ELEMENTS, jnp.float32)
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def call() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    copy = runner.Contender(call, jax.block_until_ready, lambda a: [np.asarray(a)])
    timing = runner.measure({"copy": copy}, rounds=21, seconds=5, queued=queued)["copy"]
    return 2 * array.nbytes / timing.median / 1e6
