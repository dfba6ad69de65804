"""What the tests of the Flax modules share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Flax itself promotes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield
