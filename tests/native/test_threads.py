"""The native kernels compute the same everywhere: on any number of threads, instruction set and memory."""

import concurrent.futures
import platform
import sys

import jax
import numpy as np
import pytest

import jax_mps
import oracle
from devices import needs_partitioning
from processes import finish, finish_all, start

SAVE_RESULTS = "import native_results; native_results.save({path!r})"


def read(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


FILLED = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
fresh = {ctypes.string_at(libc.malloc(size), size) for size in (1 << 12, 1 << 22)}
assert all(len(set(content)) == 1 and content[0] for content in fresh), "this allocator does not fill memory"
"""


@pytest.mark.full
@pytest.mark.usefixtures("native")
def test_results_depend_neither_on_the_number_of_threads_nor_on_what_is_in_memory(tmp_path):
    # glibc fills new memory with a byte or its complement: a result that is not wholly written shows it.
    fillings = {"1": "1", "2": "254", "8": "85"}
    running, paths = [], []
    for threads, byte in fillings.items():
        paths.append(str(tmp_path / f"{threads}.npz"))
        code = FILLED * (sys.platform == "linux") + SAVE_RESULTS.format(path=paths[-1])
        running.append(start(code, NPROC=threads, MALLOC_PERTURB_=byte))
    assert [output.split()[1] for output in finish_all(running)] == list(fillings)
    first, *others = map(read, paths)
    assert len(first) > 200
    for other in others:
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.full
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64"
)
@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_the_instruction_set(tmp_path):
    sets = ("x86-64-v3", "x86-64-v4")
    paths = [str(tmp_path / f"{name}.npz") for name in sets]
    running = [
        start(SAVE_RESULTS.format(path=path), JAX_MPS_INSTRUCTION_SET=name)
        for name, path in zip(sets, paths, strict=True)
    ]
    chosen = [output.split()[0] for output in finish_all(running)]
    assert chosen[0] == sets[0]
    # A processor without the newest one uses the next.
    assert chosen == sorted(chosen)
    assert all(got <= asked for got, asked in zip(chosen, sets, strict=True))
    first, *others = map(read, paths)
    for other in others:
        for name, a in first.items():
            b = other[name]
            if a.dtype.kind in "iub" and "max" in name:
                np.testing.assert_array_equal(a, b, err_msg=name)
            elif a.dtype == np.uint16:  # bfloat16, whose neighbours are neighbouring numbers
                assert np.abs(a.astype(int) - b.astype(int)).max(initial=0) <= 1, name
            else:
                eps = float(np.finfo(a.dtype).eps)
                exact = name.startswith("max") and name.endswith(" 0")
                rtol = 0 if exact else (32 if name.startswith("conv") else 4) * eps
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=name)


# --- threads ------------------------------------------------------------------------------------------

CHAINS = """
import jax, jax.numpy as jnp, numpy as np, jax_mps
pools = [jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool]

def chain(i, x):
    x = jnp.sin(x + i)
    x = jnp.einsum("bhwc,wv->bhvc", x, jnp.cos(x[0, :, :, 0]))
    return jax.grad(lambda x: pools[i % 3](x, 3, strides=1, padding=1, implementation="native").sum())(x)

x = np.random.default_rng(0).standard_normal((4, 128, 128, 8)).astype(np.float32)
chains = jax.jit(lambda x: [chain(i, x) for i in range(8)])
first = [np.asarray(y) for y in chains(x)]
assert all(np.isfinite(y).all() for y in first)
for _ in range(20):
    for a, b in zip(first, chains(x)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("done")
"""


@pytest.mark.parametrize("threads", ["1", "2", "8"])
@pytest.mark.usefixtures("native")
def test_independent_calls_in_one_program_do_not_wait_for_each_other(threads):
    # A kernel that waits for tasks that wait for its own thread hangs here, with 8 chains on 2 threads.
    assert finish(start(CHAINS, NPROC=threads), timeout=120) == "done\n"


@pytest.mark.parametrize(
    ("form", "devices", "pool"),
    [
        ("plain", "2", "1"),
        ("vmap", "1", "2"),
        ("scan", "8", "1"),
        ("callback", "1", "1"),
        pytest.param("sharded", "4", "2", marks=needs_partitioning),
        ("traced", "1", "2"),
    ],
)
@pytest.mark.full
@pytest.mark.usefixtures("native")
def test_threads_on_several_devices_neither_wait_for_ever_nor_change_the_bits(form, devices, pool):
    flags = f"--xla_force_host_platform_device_count={devices}"
    finish(start(f"import chains; chains.run({form!r}, 5, 0)", NPROC=str(pool), XLA_FLAGS=flags))


@pytest.mark.parametrize(
    "way",
    [
        "forked_before_use",
        "forked_after_use",
        pytest.param("spawned", marks=pytest.mark.full),
        pytest.param("loaded", marks=pytest.mark.full),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="Apple's libraries do not work in forked processes")
@pytest.mark.usefixtures("native")
def test_processes_that_a_program_starts_work(way):
    if way == "loaded":
        pytest.importorskip("torch")
    finish(start(f"if __name__ == '__main__':\n    import forks; forks.WAYS[{way!r}]()", NPROC="2"))


NEW_MEMORY = """
import jax, numpy as np, jax_mps

pool = dict(window_shape=3, strides=3, implementation="native")
x = np.random.default_rng(0).permutation(2 * 387 * 381 * 33).astype(np.float32).reshape(2, 387, 381, 33)
spread = jax.jit(lambda g: jax_mps.avg_pool_gradient(g, x.shape, **pool))
y, pull_back = jax.vjp(lambda x: jax_mps.max_pool(x, **pool), x)
pull_back = jax.jit(pull_back)
stretched = lambda a: a.repeat(3, axis=1).repeat(3, axis=2)
largest = x == stretched(np.asarray(y))
kept = []
for seed in range(3):
    g = np.random.default_rng(seed).standard_normal(y.shape).astype(np.float32)
    for _ in range(3):
        spread(g).block_until_ready()
        put, = pull_back(g)
    kept += [(spread(g), stretched(g / 9)), (put, np.where(largest, stretched(g), 0))]
for got, want in kept:
    np.testing.assert_array_equal(got, want)
print("done")
"""


@pytest.mark.usefixtures("native")
def test_results_in_memory_that_the_system_supplies_meanwhile():
    # 39 MB are new at every call, and in part again what an earlier call gave back.
    assert finish(start(NEW_MEMORY, NPROC="2")) == "done\n"


@pytest.mark.usefixtures("native")
def test_python_threads_may_share_a_function():
    @jax.jit
    def f(x):
        return jax.value_and_grad(
            lambda x: (
                jax_mps.max_pool(x, 3, strides=2, padding=1, implementation="native").sum()
                + jax_mps.l2_pool(x, 3, strides=2, padding=1, implementation="native").sum()
            )
        )(x)

    images = [oracle.distinct((2, 65, 64, 16), seed=seed) for seed in range(8)]
    expected = [jax.tree.map(np.asarray, f(x)) for x in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(f, images), expected, strict=True):
                np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
                np.testing.assert_array_equal(got[1], want[1])
