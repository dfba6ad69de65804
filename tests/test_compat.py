"""The warning of a JAX that is newer than the newest tested."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from jax_mps import _compat


@pytest.mark.parametrize("version", [(0, 4, 34), (0, 12), (0, 12, 0), (0, 12, 99), jax.__version_info__])
def test_a_tested_version_is_silent(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.warn_if_untested(version)


@pytest.mark.parametrize("version", [(0, 13, 0), (1, 0)])
def test_a_newer_version_is_named(version):
    name = ".".join(map(str, version))
    with pytest.warns(UserWarning, match=re.escape(f"tested on JAX up to 0.12, and this is JAX {name}.")):
        _compat.warn_if_untested(version)


def test_one_warning_a_process():
    code = (
        "import warnings, jax; jax.__version_info__ = (0, 99, 1)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import jax_mps, jax_mps.mps, jax_mps\n"
        "print(*[w.message for w in caught if 'tested on JAX' in str(w.message)], sep='\\n')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert len(run.stdout.splitlines()) == 1
    assert "this is JAX 0.99.1" in run.stdout


def test_the_newest_tested_is_a_row_of_the_tested_versions():
    script = Path(__file__).parents[1] / ".ci" / "versions"
    if not script.exists():
        pytest.skip("a source distribution has no .ci")
    rows = re.search(r"^rows=\((.*)\)$", script.read_text(), re.MULTILINE)
    versions = [tuple(map(int, row.partition("-")[0].split("."))) for row in rows[1].split()]
    assert max(versions)[:2] == _compat.NEWEST_TESTED
