"""Several processes: `examples/train_distributed.py` on 2 and 4 of them, and one image over two.

Every run has to have the losses of one process alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import lax

import processes
from devices import needs_partitioning

pytestmark = [
    pytest.mark.skipif(
        not (hasattr(jax, "shard_map") and hasattr(lax, "pcast")), reason="the example needs a newer JAX"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"
SMALL = ["--size=16", "--channels=4", "--levels=2", "--batch=8", "--timeout=20"]


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    # One device a process: that of a machine of its own.
    outer = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "JAX_MPS_TEST_DEVICES")}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *SMALL, *map(str, arguments)],
        env=outer | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(log: Path, *arguments: object) -> dict[int, float]:
    """Trains to the end; the loss of each step."""
    processes.finish(start(f"--log={log}", *arguments), timeout=120)
    return losses(log)


def losses(log: Path) -> dict[int, float]:
    lines = log.read_text().splitlines() if log.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """What one process computes."""
    found = run(tmp_path_factory.mktemp("alone") / "log", "--steps=6")
    assert sorted(found) == list(range(6))
    assert found[5] < found[0]
    return found


def check(found: dict[int, float], expected: dict[int, float], begin: int = 0) -> None:
    """The same numbers to rounding: sums over devices are formed in another order."""
    steps = range(begin, len(expected))
    assert sorted(found) == list(steps)
    np.testing.assert_allclose([found[i] for i in steps], [expected[i] for i in steps], rtol=2e-5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_an_accelerated_stock_model(count: int, alone: dict[int, float], tmp_path: Path) -> None:
    check(run(tmp_path / "log", "--steps=6", "--stock", f"--processes={count}"), alone)


@pytest.mark.full
def test_a_checkpoint_of_two_processes_is_read_by_one_and_by_four(
    alone: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    first = run(tmp_path / "two", "--steps=3", "--processes=2", f"--checkpoint={folder}")
    check(first, {i: alone[i] for i in range(3)})
    for count in (1, 4):
        copy = tmp_path / f"state of {count}"
        shutil.copytree(folder, copy)
        log = tmp_path / f"log of {count}"
        check(run(log, "--steps=6", f"--processes={count}", f"--checkpoint={copy}"), alone, begin=3)


@pytest.mark.full
def test_a_killed_process_ends_the_others_and_training_resumes(tmp_path: Path) -> None:
    folder, log, address = tmp_path / "state", tmp_path / "log", free_address()
    endless = ["--steps=100000", "--timeout=6", "--every=2", f"--checkpoint={folder}", f"--log={log}"]
    both = [start(*endless, TRAIN_DISTRIBUTED_PLACE=f"{address} 2 {i}") for i in range(2)]
    try:
        end = time.monotonic() + 120
        while len(losses(log)) < 8:
            assert time.monotonic() < end, "it does not train"
            assert all(process.poll() is None for process in both), both[0].communicate()
            time.sleep(0.05)
        both[1].send_signal(signal.SIGKILL)
        _, errors = both[0].communicate(timeout=100)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[0].returncode != 0
    assert "Gloo" in errors or "distributed service" in errors, errors

    trained = losses(log)
    steps = max(trained) + 4
    expected = run(tmp_path / "alone", f"--steps={steps}")
    resumed = run(
        tmp_path / "resumed", f"--steps={steps}", "--processes=2", f"--checkpoint={folder}", "--every=2"
    )
    begin = min(resumed)
    assert 0 < begin <= max(trained) + 1, "the checkpoint did not survive"
    check(resumed, expected, begin)


ONE_IMAGE = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jax_mps
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.distributed.initialize({address!r}, 2, {number})
assert (jax.device_count(), jax.local_device_count()) == (2, 1)
mesh = Mesh(np.array(jax.devices()), ("rows",))
image = np.random.default_rng(0).standard_normal((1, 256, 64, 4)).astype(np.float32)
kernel = np.random.default_rng(1).standard_normal((3, 3, 4, 4)).astype(np.float32)

def loss(x, kernel):
    x = jax_mps.conv(x, kernel, strides=1, padding=1)
    x = jax_mps.max_pool(x, 3, strides=2, padding=1)
    return jnp.mean(jnp.sin(jax_mps.conv_transpose(x, kernel, strides=2, padding=1)))

step = jax.value_and_grad(loss, (0, 1))
expected, (dx, dk) = jax.jit(step)(image, kernel)
rows = NamedSharding(mesh, P(None, "rows"))
# Each process has its own rows alone.
mine = jax.make_array_from_callback(image.shape, rows, lambda index: image[index])
compiled = jax.jit(step).lower(mine, kernel).compile()
assert "all-gather" not in compiled.as_text()
found, (of_image, of_kernel) = compiled(mine, kernel)
np.testing.assert_allclose(found, expected, rtol=1e-5)
(part,) = of_image.addressable_shards
assert part.data.shape == (1, 128, 64, 4)
np.testing.assert_allclose(part.data, dx[part.index], rtol=1e-4, atol=1e-7)
np.testing.assert_allclose(of_kernel.addressable_data(0), dk, rtol=1e-4, atol=1e-5)
"""


@needs_partitioning
def test_one_image_over_two_processes() -> None:
    address = free_address()
    both = [processes.start(ONE_IMAGE.format(address=address, number=i)) for i in range(2)]
    processes.finish_all(both, timeout=120)
