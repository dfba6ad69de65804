"""PyTorch as a contender: its tensors in either memory order, on the device that JAX uses."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from jax_mps.cli.bench.runner import Contender

__all__ = ["Peer"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """PyTorch names axes channels first; `torch_channels_last` differs in the order in memory only.

    Both are asked in either of our layouts, for both are there for a user of PyTorch.
    """

    torch: Any
    channels_last: bool
    device: str
    dtype: Any

    @classmethod
    def find(cls, name: str, ndim: int, dtype: str) -> Self:
        """The contender of that name; `NotImplementedError` says why there is none."""
        if not importlib.util.find_spec("torch"):
            raise NotImplementedError("PyTorch is not installed")
        torch = importlib.import_module("torch")
        channels_last = name == "torch_channels_last"
        if channels_last and ndim == 1:
            raise NotImplementedError("PyTorch has no channels-last format for one spatial axis")
        on_gpu = jax.devices()[0].platform in ("cuda", "gpu")
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
        # As JAX does: matrix units may round float32 to TF32, and the fastest algorithm is looked for.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(_cores())
        return cls(torch, channels_last, "cuda" if on_gpu else "cpu", getattr(torch, dtype))

    def tensor(self, array: np.ndarray, axis: int = 1) -> Any:
        """A channels-last array as a tensor whose channels are at `axis`, in this contender's order."""
        if not self.channels_last:
            array = np.ascontiguousarray(np.moveaxis(array, -1, axis))
        made = self.torch.from_numpy(np.array(array)).to(device=self.device, dtype=self.dtype)
        return made.movedim(-1, axis) if self.channels_last else made

    def contender(self, call: Callable[[], tuple[Any, ...]], axis: int = 1) -> Contender:
        """The contender that makes this call, whose results have their channels at `axis`."""
        try:
            call()
        except RuntimeError as error:
            if "not implemented for" in str(error):
                raise NotImplementedError(str(error)) from error
            raise

        def fetch(outputs: Any) -> list[np.ndarray]:
            arrays = [t.detach().to("cpu", self.torch.float64).numpy() for t in outputs]
            return [np.moveaxis(a, axis, -1) if a.ndim else a for a in arrays]

        synchronize = self.torch.cuda.synchronize
        return Contender(
            call, (lambda _: synchronize()) if self.device == "cuda" else (lambda _: None), fetch
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
