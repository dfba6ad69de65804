"""Python in processes of its own, on one CPU device, with what was installed and the helpers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORT = str(Path(__file__).parent)


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """Starts Python on `code`, with every warning as an error."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.append({SUPPORT!r})\n{code}"],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What the process printed; it fails the test if it crashes or does not come to an end."""
    return finish_all([process], timeout)[0]


def finish_all(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """The same of several, none of which is left behind where another fails."""
    outputs, complaints = [], []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=timeout)
            complaint = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            complaint = f"no end after {timeout} s"
        outputs.append(output)
        if complaint:
            complaints.append(f"{complaint}\n{output}\n{errors}")
    assert not complaints, "\n".join(complaints)
    return outputs
