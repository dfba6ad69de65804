"""Runs a StableHLO program on IREE, whose compiler makes Metal source of it too."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import iree.runtime as rt
import jax
import numpy as np

import programs
from jax_mps.cli import metal_source

DEVICES = {"llvm-cpu": "local-sync", "vmvx": "local-sync", "vulkan-spirv": "vulkan"}
"""IREE's backends, and the devices that run what they compile."""

_FLAGS = {"llvm-cpu": ("--iree-llvmcpu-target-cpu=host",)}


def run(lowered: Any, *operands: Any, backend: str, flags: Sequence[str] = ()) -> list[np.ndarray]:
    """The results of a lowered program, as the leaves of what the function returns.

    Args:
      lowered: the program, of `jax.jit(f).trace(...).lower(...)`.
      operands: the arguments of f.
      backend: one of `DEVICES`.
      flags: more flags of the compiler.
    """
    code = metal_source.compile_program(lowered.as_text(), backend, (*_FLAGS.get(backend, ()), *flags))
    config = _config(DEVICES[backend])
    module = rt.load_vm_module(rt.VmModule.copy_buffer(config.vm_instance, code), config)
    # Written in place by a program that returns its argument, an operand would change.
    arguments = [np.array(x, order="C") for x in programs.arguments(lowered, operands)]
    results = module["main"](*arguments)
    results = results if isinstance(results, tuple) else (results,)
    kinds = [info.dtype for info in jax.tree.leaves(lowered.out_info)]
    return [_to_host(config.device, result).astype(kind) for result, kind in zip(results, kinds, strict=True)]


@functools.cache
def _config(device: str) -> rt.Config:
    return rt.Config(device)


def _to_host(device: Any, array: rt.DeviceArray) -> np.ndarray:
    """What `array.to_host()` does, which fails on Vulkan: no driver imports memory at every address."""
    source = array._buffer_view.get_buffer()
    target = device.allocator.allocate_buffer(
        memory_type=int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    done = device.create_semaphore(0)
    device.queue_copy(
        source,
        target,
        wait_semaphores=rt.HalFence.create_at(done, 0),
        signal_semaphores=rt.HalFence.create_at(done, 1),
    )
    rt.HalFence.create_at(done, 1).wait()
    return np.array(target.map().asarray(array.shape, array._get_raw_dtype()))
