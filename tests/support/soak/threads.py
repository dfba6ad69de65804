"""Many threads, devices and processes: no deadlock, and no change of the bits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

from processes import finish, start

PATIENCE = 400
"""Seconds after which a child prints the stacks of its threads and ends."""

FORMS = ("plain", "vmap", "scan", "callback", "sharded", "traced")
WAYS = ("forked_before_use", "forked_after_use", "spawned", "loaded")


def step(seed: int, number: int, check: Callable[[Any], None]) -> None:
    """Chains in a form and on so many devices, which come in turns; now and then processes."""
    rng = random.Random(f"{seed} {number}")
    check(
        {
            "form": FORMS[number % len(FORMS)],
            "devices": rng.choice([1, 2, 4, 8]),
            # Threads of XLA's pool: one is where waiting for each other ends nowhere.
            "pool": rng.choice([1, 1, 2, 8]),
            "one_processor": hasattr(os, "sched_setaffinity") and rng.random() < 0.3,
            "rounds": 60,
            "seed": rng.randrange(1 << 32),
        }
    )
    if number % len(FORMS) == 0:
        for way in WAYS:
            check({"way": way, "pool": rng.choice([1, 2, 8])})


def check(case: Any) -> None:
    """Runs the case in a process of its own."""
    environment = {"NPROC": str(case["pool"])}
    lines = ["import faulthandler, os", f"faulthandler.dump_traceback_later({PATIENCE}, exit=True)"]
    if "way" in case:
        # Spawned workers read this, too.
        lines += ["if __name__ == '__main__':", f"    import forks; forks.WAYS[{case['way']!r}]()"]
    else:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={case['devices']}"
        if case["one_processor"]:
            lines.append("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})")
        lines.append(f"import chains; chains.run({case['form']!r}, {case['rounds']}, {case['seed']})")
    finish(start("\n".join(lines), **environment), timeout=PATIENCE + 60)
