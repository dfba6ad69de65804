"""JAX plugins for Apple GPUs: which are installed, which of them live, and whether they serve."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib import metadata
from pathlib import Path

import jax

__all__ = ["report"]


@dataclasses.dataclass(frozen=True)
class _Plugin:
    """What is known of a distribution that brings a JAX platform for Apple GPUs.

    Attributes:
      platform: the name of its JAX platform.
      alive: whether it still gets releases that follow JAX's.
      remark: what it is; of one that is not alive, the JAX versions that it works with.
    """

    platform: str
    alive: bool
    remark: str


# As of November 2026, from the package index and the projects' own pages.
_KNOWN = {
    "jax-metal": _Plugin(
        "METAL", False, "Apple's; no release since 0.1.1 of October 2024, works with JAX 0.4.34 to 0.5.0 only"
    ),
    "jax-mps": _Plugin("mps", True, "on MLX; a series for every JAX from 0.10 on"),
    "jax-metallib": _Plugin("mps", True, "on MPSGraph; last release in June 2026, for JAX 0.10"),
    "iree-pjrt-plugin-metal-iree-metal": _Plugin(
        "iree_metal",
        True,
        "of iree-metal, on IREE; a preview of August 2026 for Apple's M4, untried here",
    ),
    "applejax": _Plugin("mps", False, "a fork of jax-mps; no release since March 2026, for JAX 0.9 only"),
    "jax-mlx-plugin": _Plugin("mlx", False, "on MLX; no release since March 2026, untried with this library"),
}


def report() -> dict[str, str]:
    """A line for every plugin for Apple GPUs that is installed; on a Mac without one, what to install.

    Plugins are found as JAX finds them, by entry points of the group `jax_plugins`, and by the names of known
    distributions. On a Mac a plugin that is not known is listed too; elsewhere it is for other hardware.

    Returns:
      What is to be said, by distribution; empty where there is nothing to say.
    """
    rows = {
        _normal(d.metadata["Name"]): d
        for d in metadata.distributions()
        if d.metadata["Name"] and (_normal(d.metadata["Name"]) in _KNOWN or _registers(d))
    }
    on_mac = sys.platform == "darwin"
    lines = {name: _line(name, rows[name]) for name in sorted(rows) if name in _KNOWN or on_mac}
    if on_mac and not lines:
        return {"none": "`pip install jax-mps` brings one for JAX 0.10 and newer"}
    return lines


def _registers(distribution: metadata.Distribution) -> bool:
    return any(entry.group == "jax_plugins" for entry in distribution.entry_points)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _line(name: str, distribution: metadata.Distribution) -> str:
    wanted = [r for r in distribution.requires or () if re.match(r"jax\b(?!-)", r) and "extra ==" not in r]
    asks = f"; asks for {wanted[0]}" if wanted else ""
    known = _KNOWN.get(name)
    if known is None:
        return f"{distribution.version}, not known to this library{asks}"
    life = "alive" if known.alive else "not alive"
    kernels = f"; {_custom_kernels(distribution)}" if name == "jax-mps" else ""
    return f"{distribution.version}, {life}: {known.remark}{asks}{kernels}; {_service(known.platform)}"


def _custom_kernels(distribution: metadata.Distribution) -> str:
    """Whether `jax-mps` has a function for Metal kernels of its callers; its source is read, not imported."""
    file = Path(str(distribution.locate_file("jax_plugins/mps/ops.py")))
    try:
        names = compile(file.read_text(), str(file), "exec").co_names
    except (OSError, SyntaxError):
        return "whether it takes custom Metal kernels cannot be told"
    return f"takes {'' if 'metal_kernel_jit' in names else 'no '}custom Metal kernels"


def _service(platform: str) -> str:
    try:
        return f"serves {len(jax.devices(platform))} device(s) of platform {platform}"
    except RuntimeError as error:
        return f"serves no device of platform {platform}: {str(error).splitlines()[0]}"
