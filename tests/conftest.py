"""What all tests share: the sample of the grids, the two CPU paths, strict promotion, 64-bit types."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator

import jax
import pytest

import haste  # noqa: F401
import sampling
import wide_types
from jax_mps.lowering import library

pytest.register_assert_rewrite("oracle", "flax_arrays")

collect_ignore = ["support"]  # no tests, and some of it imports what the tests do not need

# Programs that tests start run on what was installed, whatever folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"

_IMPORTS_TORCH = re.compile(r"import .*\btorch\b")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, metavar="N", help="chooses the sample of large grids")
    parser.addoption(
        "--random",
        type=int,
        default=50,
        metavar="N",
        help="random cases of stock operations, MPS classes, poolings; `.ci/soak` runs them for hours",
    )
    parser.addoption(
        "--iree",
        metavar="BACKEND",
        help="all of Apple's programs through this backend of IREE: llvm-cpu, vmvx or vulkan-spirv",
    )
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every N-th test")
    parser.addoption("--first", type=int, default=0, metavar="N", help="of those, start with the N-th test")


def pytest_report_header(config: pytest.Config) -> str:
    return f"sample of the grids: --seed {config.getoption('seed')} (`-m full` runs the whole grids)"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    sampling.mark_sample(items, config.getoption("seed"))
    yield  # `-m`, `-k` and others choose
    if config.getoption("iree") != "vulkan-spirv":
        items[:] = [item for item in items if item.get_closest_marker("vulkan") is None]
    items[:] = items[config.getoption("first") :: config.getoption("every")]
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if isinstance(item, pytest.DoctestItem) and _IMPORTS_TORCH.search(item.dtest.docstring or ""):
                item.add_marker(pytest.mark.skip("PyTorch is missing"))


@pytest.fixture
def native() -> None:
    """Skips the test where the native library is missing; fails it where that is not allowed."""
    try:
        status = library.status()
    except RuntimeError as error:
        pytest.fail(str(error))
    if not status.available:
        message = f"the native library is missing: {status.reason}"
        if os.environ.get("JAX_MPS_NATIVE") == "required":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(params=["native", "xla"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Both CPU paths, one after the other."""
    if request.param == "native":
        request.getfixturevalue("native")
    return request.param


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """No implicit change of type or rank, in the library as in the tests."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test."""
    with wide_types.enable_x64():
        yield
