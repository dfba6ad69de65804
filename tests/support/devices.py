"""Several CPU devices, for tests of arrays that are spread over them.

The number of devices is fixed when JAX starts, so such tests run in a process of their own, which has four
or eight.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from jax_mps.lowering import library

DEVICES = int(os.environ.get("JAX_MPS_TEST_DEVICES", "0"))
"""How many devices this process has, if it is such a process."""

INSIDE = DEVICES == 4

needs_explicit_sharding = pytest.mark.skipif(
    not (hasattr(jax, "set_mesh") and hasattr(jax.sharding, "AxisType")),
    reason="this JAX has no explicit sharding",
)

needs_partitioning = pytest.mark.skipif(
    jax.__version_info__ < (0, 8) or not library.status().available,
    reason="partitioning by rule needs JAX 0.8 and the native kernels",
)


@pytest.mark.parametrize(
    "group",
    [
        "TestShardMap",
        "TestAutomaticSharding",
        pytest.param("TestExplicitSharding", marks=[needs_explicit_sharding, pytest.mark.full]),
    ],
)
def test_on_four_devices(request: pytest.FixtureRequest, group: str) -> None:
    """Runs a class of tests of the file that imports this, in a process with four devices."""
    run_on_devices(4, request, group)


def run_on_devices(count: int, request: pytest.FixtureRequest, group: str) -> None:
    """Runs a class of tests of the file that asks, in a process with so many devices."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        "JAX_MPS_TEST_DEVICES": str(count),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
    }
    chosen = [f"-m={request.config.option.markexpr}", f"--seed={request.config.option.seed}"]
    pytest_command = [sys.executable, "-m", "pytest", *["-n0"] * bool(importlib.util.find_spec("xdist"))]
    outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [*pytest_command, "-p", "no:cacheprovider", "-q", *chosen, f"{request.path}::{group}"],
        env=outer | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert re.search(r"\b\d+ passed", run.stdout), run.stdout


test_on_four_devices.__test__ = not INSIDE  # type: ignore[attr-defined]


def collectives(text: str) -> set[str]:
    """What devices exchange in a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return set(re.findall(rf"({names})(?:-start)?\(", text))


def shard_map(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map as experimental

    # It does not know how primitives of other libraries replicate.
    return experimental(f, mesh, in_specs, out_specs, check_rep=False)


@pytest.fixture(autouse=True, scope="module")
def four_devices() -> None:
    if DEVICES:
        assert jax.device_count() == DEVICES
        assert jax.devices()[0].platform == "cpu"
        # Machine code that is optimised would double the time; how XLA partitions stays the same.
        jax.config.update("jax_disable_most_optimizations", True)
