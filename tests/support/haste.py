"""Flags with which XLA compiles small programs fast. Import this before the first one is compiled.

Compiling takes most of the time of the tests, and optimising most of that. `.ci/versions` has everything
optimised.
"""

from __future__ import annotations

import os

import jax

FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    HASTE = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",  # parts of a small program take longer than the whole
    ]
    if (0, 6, 2) <= jax.__version_info__ < (0, 11):  # XLA aborts at flags that it does not know
        HASTE.append("--xla_cpu_use_fusion_emitters=false")  # half the time of most tests
    os.environ["XLA_FLAGS"] = " ".join([FLAGS, *HASTE]).lstrip()
