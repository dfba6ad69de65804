"""Trains a U-Net that removes noise, on one process or on many.

    python examples/train_distributed.py                    one process, all of its devices
    python examples/train_distributed.py --processes 4      four processes on this machine
    srun python examples/train_distributed.py --cluster     Slurm, Open MPI, Kubernetes (JobSet), Cloud TPU

With `--checkpoint FOLDER` the state is saved, and a run that was stopped goes on where it was, with any
number of processes. Needs `pip install 'jax-mps-primitives[distributed]'`. `docs/scaling.md` explains the
choices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import Progress

import jax_mps
from jax_mps.flax import models
from jax_mps.flax.models import linen

State = dict[str, Any]

PLACE = "TRAIN_DISTRIBUTED_PLACE"
"""By this variable a process that `start_all` starts knows the coordinator, their number and its own."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="how many to start on this machine")
    parser.add_argument(
        "--cluster", action="store_true", help="this is one of several processes of a cluster"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="images of a step, of all processes together")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image along each axis")
    parser.add_argument("--channels", type=int, default=32, help="of the highest level")
    parser.add_argument("--levels", type=int, default=3, help="of the U-Net")
    parser.add_argument("--stock", action="store_true", help="the model on Flax's own layers, accelerated")
    parser.add_argument("--checkpoint", type=Path, help="the folder of checkpoints")
    parser.add_argument("--every", type=int, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--log", type=Path, help="a file for the losses, a line of JSON a step")
    parser.add_argument(
        "--timeout", type=int, default=100, help="seconds after which a silent process is dead"
    )
    return parser.parse_args()


# --- processes ------------------------------------------------------------------------------------------


def start_all(count: int) -> int:
    """Runs this program in so many processes on this machine; gives the first exit status that is not 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    places = [os.environ | {PLACE: f"{address} {count} {i}"} for i in range(count)]
    running = [subprocess.Popen([sys.executable, *sys.argv], env=place) for place in places]
    try:
        return next((status for status in [process.wait() for process in running] if status), 0)
    finally:
        for process in running:
            process.kill()


def join(cluster: bool, timeout: int) -> None:
    """Makes this process one of several, if it is."""
    if PLACE in os.environ:
        address, count, number = os.environ[PLACE].split()
        jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=timeout)
    elif cluster:
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)


# --- data -----------------------------------------------------------------------------------------------


def images(step: int, numbers: range, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of a step with those numbers, noisy and clean: waves of random directions.

    An image depends on its number alone, so the batch is the same for any number of processes.
    """
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 2), -1)
    clean, noisy = [], []
    for number in numbers:
        rng = np.random.default_rng((step, number))
        waves = grid @ rng.normal(0, 6, (2, 3)) + rng.uniform(0, 7, 3)
        clean.append(np.sin(waves))
        noisy.append(clean[-1] + rng.normal(0, 0.3, waves.shape))
    return np.stack(noisy).astype(np.float32), np.stack(clean).astype(np.float32)


def share(step: int, batch: int, size: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """The batch of a step over all devices; this process makes its own images alone."""
    sharding = NamedSharding(mesh, P("data"))
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    begin = min(part[0].start or 0 for part in parts)
    end = max(batch if part[0].stop is None else part[0].stop for part in parts)
    mine = images(step, range(begin, end), size)
    shape = (batch, size, size, 3)
    noisy, clean = (jax.make_array_from_process_local_data(sharding, part, shape) for part in mine)
    return noisy, clean


# --- training -------------------------------------------------------------------------------------------


def make_step(network: Any, rule: Any, mesh: Mesh) -> Callable[..., tuple[State, jax.Array]]:
    """A step of training: each device has its part of the batch, and all of the parameters."""

    def loss(params: Any, noisy: jax.Array, clean: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(network.apply(params, noisy) - clean))

    def gradient(params: Any, noisy: jax.Array, clean: jax.Array) -> tuple[jax.Array, Any]:
        # Each device differentiates by its own copy of the parameters. By default JAX adds up every gradient
        # on its own, and between processes each of these sums takes a latency.
        mine = lax.pcast(params, "data", to="varying")
        found = jax.value_and_grad(loss)(mine, noisy, clean)
        # All of them as one vector: Gloo sends array by array.
        vector, unravel = ravel_pytree(found)
        return unravel(lax.pmean(vector, "data"))

    of_all = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())

    def step(state: State, noisy: jax.Array, clean: jax.Array) -> tuple[State, jax.Array]:
        value, found = of_all(state["params"], noisy, clean)
        updates, rest = rule.update(found, state["rule"])
        return {"params": optax.apply_updates(state["params"], updates), "rule": rest}, value

    return jax.jit(step, donate_argnums=0)


def start(network: Any, rule: Any, size: int, mesh: Mesh) -> State:
    """The first state, on every device."""

    def init() -> State:
        params = network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
        return {"params": params, "rule": rule.init(params)}

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))()


@contextlib.contextmanager
def checkpoints(folder: Path | None, every: int) -> Iterator[ocp.CheckpointManager | None]:
    """The manager of the checkpoints in a folder, if there is one; the last ones are complete at the end."""
    if folder is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def train(args: argparse.Namespace) -> None:
    """Trains, and resumes where a run was stopped."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if args.batch % mesh.size:
        raise SystemExit(f"--batch must be a multiple of the {mesh.size} devices, got {args.batch}")
    first = jax.process_index() == 0
    if args.stock:
        jax_mps.accelerate()
    source = models.with_stock_flax(linen) if args.stock else linen
    network = source.UNet(channels=args.channels, levels=args.levels)
    rule = optax.adam(1e-3)
    state, begin = start(network, rule, args.size, mesh), 0
    step = make_step(network, rule, mesh)
    log = args.log.open("a") if first and args.log else contextlib.nullcontext()
    with checkpoints(args.checkpoint, args.every) as manager, log, Progress(disable=not first) as progress:
        if manager and manager.latest_step() is not None:
            begin = manager.latest_step() + 1
            state = manager.restore(begin - 1, args=ocp.args.StandardRestore(state))
        bar = progress.add_task("training", total=args.steps, completed=begin)
        timed = time.perf_counter()
        for i in range(begin, args.steps):
            state, loss = step(state, *share(i, args.batch, args.size, mesh))
            value = float(loss)
            if i == begin:
                timed = time.perf_counter()  # the first step compiles
            if manager:
                manager.save(i, args=ocp.args.StandardSave(state), force=i == args.steps - 1)
            if first and args.log:
                log.write(json.dumps({"step": i, "loss": value}) + "\n")
                log.flush()
            progress.update(bar, advance=1, description=f"loss {value:.4f}")
        seconds = time.perf_counter() - timed
    done = args.steps - begin - 1
    if first and done > 0:
        rate = done * args.batch / seconds
        print(f"{rate:.1f} images a second on {mesh.size} devices of {jax.process_count()} processes")


def main() -> None:
    """Starts the processes, or is one of them."""
    args = arguments()
    if args.processes > 1 and PLACE not in os.environ:
        raise SystemExit(start_all(args.processes))
    join(args.cluster, args.timeout)
    train(args)


if __name__ == "__main__":
    main()
