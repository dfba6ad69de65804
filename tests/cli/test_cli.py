"""The command line, in processes of its own."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import jax
import pytest

import jax_mps
from jax_mps import __main__ as cli
from jax_mps.cli import extras, plugins
from jax_mps.cli.bench import runner
from jax_mps.lowering import library


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "jax_mps", *arguments],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# --- info ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("info",), ()], ids=["info", "nothing"])
def test_info(arguments):
    run = command(*arguments, JAX_MPS_NATIVE="auto")
    assert (run.returncode, run.stderr) == (0, "")
    sections = dict(part.split("\n", 1) for part in run.stdout.strip().split("\n\n"))
    assert list(sections) == ["versions", "devices", "paths", "native kernels"]

    def rows(title: str) -> dict[str, str]:
        lines = [line.strip() for line in sections[title].splitlines()]
        return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines)}

    assert rows("versions")["jax"] == metadata.version("jax")
    assert rows("versions")["jaxlib"] == metadata.version("jaxlib")
    assert any("platform cpu" in kind for kind in rows("devices").values())
    paths = rows("paths")
    assert {"cuda", "METAL (jax-metal)", "mps (jax-mps)"} <= set(paths)
    printed, native = rows("native kernels"), jax_mps.native_available()
    in_parts = native and jax.__version_info__ >= (0, 8)
    assert paths["cpu, sharded arrays under jit"].startswith("native" if in_parts else "StableHLO")
    assert Path(printed["library"]).name == Path(library.status().path).name
    assert paths["cpu, one device or shard_map"] == ("native kernels" if native else "StableHLO")
    if native:
        assert printed["FFI API of library"] == "0.1"
        assert printed["instruction set"] == library.status().instruction_set
        assert int(printed["threads"]) >= 1
    else:
        assert printed["not used"].endswith("the StableHLO path serves")


def test_info_without_the_library_says_why():
    run = command("info", JAX_MPS_NATIVE="off")
    assert run.returncode == 0
    assert "JAX_MPS_NATIVE=off; the StableHLO path serves" in run.stdout
    assert command("info", "--require-native", JAX_MPS_NATIVE="off").returncode == 1


@pytest.mark.usefixtures("native")
def test_info_can_require_the_library():
    assert command("info", "--require-native").returncode == 0


def _distribution(
    name: str, version: str, *requires: str, plugin: bool = True, folder: Path = Path("nowhere")
) -> types.SimpleNamespace:
    """What `importlib.metadata` shows of a distribution."""
    points = [metadata.EntryPoint("some_plugin", "jax_plugins.some", "jax_plugins")] if plugin else []
    return types.SimpleNamespace(
        metadata={"Name": name},
        version=version,
        requires=list(requires),
        entry_points=points,
        locate_file=folder.joinpath,
    )


def _plugins(monkeypatch, system: str, served: tuple[str, ...], *distributions) -> dict[str, str]:
    def devices(platform: str) -> list[str]:
        if platform not in served:
            raise RuntimeError(f"Unknown backend {platform}\nmore")
        return ["a device"]

    monkeypatch.setattr(plugins.sys, "platform", system)
    monkeypatch.setattr(plugins.metadata, "distributions", lambda: list(distributions))
    monkeypatch.setattr(plugins.jax, "devices", devices)
    return plugins.report()


def test_info_says_which_plugin_is_alive(monkeypatch):
    found = _plugins(
        monkeypatch, "darwin", ("mps",),
        _distribution("numpy", "2.0", plugin=False),
        _distribution("jax_metal", "0.1.1", "wheel~=0.35", "jax>=0.4.34", "jaxlib>=0.4.34"),
        _distribution("jax-mps", "0.11.1", "jax<0.12,>=0.11", "jax>=0.11; extra == 'dev'"),
        _distribution("jax-novel", "3.0", "jax-mps", "jax (>=0.12)"),
        _distribution("JAX.metallib", "0.10.1.0", plugin=False),
        _distribution("iree_pjrt_plugin_metal_iree_metal", "3.11.0.dev2026081801", "jax<0.12,>=0.10.2"),
    )  # fmt: skip
    assert list(found) == [
        "iree-pjrt-plugin-metal-iree-metal", "jax-metal", "jax-metallib", "jax-mps", "jax-novel"
    ]  # fmt: skip
    iree, metal, metallib, mps, novel = found.values()
    assert iree.startswith("3.11.0.dev2026081801, alive: of iree-metal, ")
    assert "serves no device of platform iree_metal" in iree
    assert metal.startswith("0.1.1, not alive: ")
    assert "JAX 0.4.34 to 0.5.0 only" in metal
    assert metal.endswith("; asks for jax>=0.4.34; serves no device of platform METAL: Unknown backend METAL")
    assert mps.startswith("0.11.1, alive: ")
    assert "; asks for jax<0.12,>=0.11; " in mps
    assert mps.endswith("; serves 1 device(s) of platform mps")
    assert metallib.startswith("0.10.1.0, alive: ")
    assert "asks for" not in metallib
    assert novel == "3.0, not known to this library; asks for jax (>=0.12)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import jax\ndef metal_kernel_jit(body):\n    raise RuntimeError", "takes custom Metal kernels"),
        ("from .kernels import metal_kernel_jit", "takes custom Metal kernels"),
        ("raise RuntimeError('imported')  # no metal_kernel_jit", "takes no custom Metal kernels"),
        ("def", "whether it takes custom Metal kernels cannot be told"),
        (None, "whether it takes custom Metal kernels cannot be told"),
    ],
)
def test_info_says_whether_the_plugin_takes_metal_kernels(source, words, monkeypatch, tmp_path):
    if source is not None:
        file = tmp_path / "jax_plugins" / "mps" / "ops.py"
        file.parent.mkdir(parents=True)
        file.write_text(source)
    plugin = _distribution("jax-mps", "0.12.0", "jax>=0.12", folder=tmp_path)
    (line,) = _plugins(monkeypatch, "darwin", ("mps",), plugin).values()
    assert f"asks for jax>=0.12; {words}; serves 1 device(s) of platform mps" in line


def test_info_without_a_plugin(monkeypatch):
    (line,) = _plugins(monkeypatch, "darwin", ()).values()
    assert "pip install jax-mps" in line
    cuda = _distribution("jax-cuda12-plugin", "0.10.2")
    assert _plugins(monkeypatch, "linux", (), cuda) == {}


def test_info_lists_plugins_and_survives_one_that_does_not_start(monkeypatch, capsys):
    def fails() -> None:
        raise RuntimeError("Unable to initialize backend 'METAL': versions\nmore")

    monkeypatch.setattr(cli.info.jax, "devices", fails)
    monkeypatch.setattr(cli.info.plugins, "report", lambda: {"jax-metal": "0.1.1, not alive"})
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "devices\n  none  Unable to initialize backend 'METAL': versions\n\n" in output
    assert "plugins for Apple GPUs\n  jax-metal  0.1.1, not alive\n\n" in output


# --- bench --------------------------------------------------------------------------------------------


@pytest.mark.full
def test_bench_checks_times_and_writes_json(tmp_path):
    path = tmp_path / "bench.json"
    selection = ["--shapes", "global", "--rounds", "3", "--seconds", "0.01"]
    run = command("bench", *selection, "--json", str(path))
    assert run.returncode == 0, run.stderr
    report = json.loads(path.read_text())
    ours = "native" if jax_mps.native_available() else "xla"
    assert report["contenders"] == [ours, "lax", "torch", "torch_channels_last"]
    assert report["versions"]["jax"] == metadata.version("jax")
    assert report["copy_gbs"] > 0
    assert not report["pages_kept"]
    assert [r["op"] for r in report["results"]] == ["forward", "keep", "pull_back", "step", "gradient_kernel"]
    for result in report["results"]:
        assert result["shape"] == "global"
        assert result["description"] == "avg 32x7x7x512 k7 s7"
        assert set(result["timings"]) | set(result["absent"]) == set(report["contenders"])
        torch = {"torch"} if importlib.util.find_spec("torch") else set()
        assert {ours, "lax"} | torch <= set(result["timings"])
        for timing in result["timings"].values():
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
            assert timing["rounds"] == 3
        assert result["op"] in run.stdout

    markdown = command("bench", "--markdown", str(path))
    assert markdown.returncode == 0
    for result in report["results"]:
        assert f"| global | {result['op']} |" in markdown.stdout


def test_bench_of_both_our_paths(tmp_path, native):
    path = tmp_path / "bench.json"
    run = command(
        "bench", "--shapes", "global", "--ops", "forward", "--rounds", "3", "--seconds", "0.01",
        "--implementations", "xla", "native", "--peers", "--json", str(path),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["timings"]) == {"xla", "native"}


PAGE_FAULTS = """
import resource
import numpy as np
from jax_mps.cli.bench import command
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if {keep}:
    assert command._keep_pages()
np.ones(1 << 23)
before = faults()
for _ in range(8):
    np.ones(1 << 23)
print(faults() - before)
"""


@pytest.mark.full
def test_bench_says_whether_pages_are_kept(tmp_path):
    path = tmp_path / "bench.json"
    run = command(
        "bench", "--shapes", "global", "--ops", "forward", "--rounds", "3", "--seconds", "0.01",
        "--peers", "--json", str(path), "--keep-pages",
    )  # fmt: skip
    if platform.libc_ver()[0] != "glibc":
        assert run.returncode == 2
        assert "--keep-pages needs glibc" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert json.loads(path.read_text())["pages_kept"]
    assert "freed memory is kept" in run.stdout
    assert "Freed memory was kept" in command("bench", "--markdown", str(path)).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose mallopt() is tested")
def test_bench_keeps_pages():
    def faults(keep):
        run = subprocess.run(
            [sys.executable, "-c", PAGE_FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    # 64 MiB, eight times: at least one fault for each huge page.
    assert faults(keep=False) >= 8 * 32
    assert faults(keep=True) < 32


def test_bench_refuses_to_time_what_is_not_there():
    run = command("bench", "--shapes", "global", "--implementations", "native", JAX_MPS_NATIVE="off")
    assert run.returncode == 2
    assert "the native kernels cannot be timed: JAX_MPS_NATIVE=off" in run.stderr


def _case(contenders: dict[str, float]) -> runner.Case:
    def make(value: float) -> runner.Contender:
        return runner.Contender(lambda: value, lambda _: None, lambda v: [jax.numpy.full(3, v)])

    makers = {name: (lambda value=value: make(value)) for name, value in contenders.items()}
    return runner.Case("shape", "what", "forward", "float32", "channels_last", 1, (1e-3,), makers)


def test_bench_stops_where_results_disagree():
    runner.run(_case({"native": 1.0, "lax": 1.0005}), rounds=3, seconds=0.01, queued=False)
    with pytest.raises(runner.Disagreement, match="output 0 of lax is off that of native"):
        runner.run(_case({"native": 1.0, "lax": 1.01}), rounds=3, seconds=0.01, queued=False)
    with pytest.raises(runner.Disagreement):
        runner.run(_case({"native": 1.0, "lax": float("nan")}), rounds=3, seconds=0.01, queued=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--shapes", "nothing"),
        ("bench", "--dtypes", "int8"),
        ("bench", "--rounds", "many"),
        ("demo", "--seed", "x"),
        ("info", "--loud"),
        ("unknown",),
    ],
)
def test_wrong_use_has_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert "usage: python -m jax_mps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), "info"), (("bench",), "--shapes"), (("demo",), "--seed")]
)
def test_help(arguments, expected, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main([*arguments, "--help"])
    assert raised.value.code == 0
    assert expected in capsys.readouterr().out


# --- lower --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("max_pool", "--shape", "2,16,16,3", "--window", "3,3", "--padding", "1", "--vjp"),
        ("max_pool", "--shape", "2,16,16,3", "--indices", "--second"),
        ("avg_pool", "--shape", "2,3,17", "--window", "3", "--padding", "1", "--ceil-mode",
         "--data-format", "channels_first"),
        ("l2_pool", "--shape", "1,6,6,6,2", "--window", "2,2,2", "--dilation", "2", "--dtype", "bfloat16"),
        ("max_unpool", "--shape", "2,4,4,3", "--output-shape", "9,8", "--jvp"),
        ("conv_transpose", "--shape", "2,4,4,6", "--window", "3,3", "--groups", "2", "--features", "4",
         "--padding", "1:0,1:1", "--output-padding", "1", "--vjp", "--platform", "mps"),
        ("conv", "--shape", "2,6,8,6", "--window", "3,3", "--groups", "3", "--features", "9",
         "--padding", "SAME", "--input-dilation", "1,2", "--vjp"),
    ],
)  # fmt: skip
def test_lower_prints_a_program_for_apple(arguments, capsys):
    assert cli.main(["lower", *arguments]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("module @")
    assert "stablehlo." in output.out
    assert output.err == ""


def test_lower_prints_metal_source(capsys):
    pytest.importorskip("iree.compiler", reason="IREE is missing; the extra `msl` has its compiler")
    assert cli.main(["lower", "max_pool", "--shape", "1,4,4,2", "--vjp", "--msl"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("#include <metal_stdlib>")
    assert "kernel void main_dispatch_0" in output.out
    assert "stablehlo." not in output.out
    assert output.err == ""


def test_lower_says_what_has_no_metal_source(capsys):
    pytest.importorskip("iree.compiler", reason="IREE is missing; the extra `msl` has its compiler")
    copy = ["lower", "max_pool", "--shape", "1,4,4,2", "--window", "1,1", "--strides", "1", "--msl"]
    assert cli.main(copy) == 0
    assert "needs no kernel" in capsys.readouterr().out
    run = ["lower", "max_pool", "--shape", "1,4,4,2", "--platform", "cpu", "--msl"]
    assert cli.main(run) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "custom_call" in output.err


def test_lower_without_iree_is_one_clear_line(monkeypatch, capsys):
    def find_spec(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras.importlib.util, "find_spec", find_spec)
    assert cli.main(["lower", "max_pool", "--shape", "1,4,4,2", "--msl"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("jax_mps: iree.compiler not installed")
    assert "[msl]" in line


def test_lower_names_what_is_outside_the_list(capsys):
    assert cli.main(["lower", "max_unpool", "--shape", "2,4,4,3", "--platform", "cuda"]) == 1
    output = capsys.readouterr()
    assert "stablehlo.scatter" in output.out
    assert "stablehlo.scatter is not among the operations that all plugins have, in %" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("max_unpool", "--shape", "1,112,112,64"), "cannot be lowered for Apple's GPUs"),
        (("max_pool", "--shape", "1,4,4,2", "--window", "5,5"), "the output size would be below 1"),
        (("max_pool", "--shape", "1,4,4,2", "--dtype", "complex64"), "x must have a dtype of"),
        (("max_pool", "--shape", f"1,{2**62},4,2"), "--shape must be an int from"),
        (("conv", "--shape", "1,4,4,2", "--features", str(2**63)), "--features must be an int from"),
    ],
)
def test_lower_says_what_cannot_be(arguments, message, capsys):
    assert cli.main(["lower", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err


def test_lower_corrects_the_case_of_a_platform(capsys):
    shape = ("max_pool", "--shape", "1,4,4,2", "--platform")
    outputs = []
    for name in ("METAL", "metal", "MPS", "mps"):
        assert cli.main(["lower", *shape, name]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3]


def test_lower_knows_no_other_platforms(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["lower", "max_pool", "--shape", "1,4,4,2", "--platform", "vulkan"])
    error = capsys.readouterr().err
    assert "must be one of cpu, cuda, rocm, tpu, METAL, mps, got 'vulkan'" in error


def test_lower_of_float64():
    run = command("lower", "l2_pool", "--shape", "1,4,4,2", "--dtype", "float64")
    assert (run.returncode, run.stdout) == (2, "")
    assert "l2_pool cannot be lowered for Apple's GPUs with an array of float64" in run.stderr


# --- optional dependencies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"), [("demo", "sklearn"), ("demo", "matplotlib"), ("demo", "optax"), ("bench", "rich")]
)
def test_a_missing_extra_is_one_clear_line(name, module, monkeypatch, capsys, tmp_path):
    def find_spec(wanted: str) -> object:
        return None if wanted == module else types.SimpleNamespace(name=wanted)

    monkeypatch.setattr(extras.importlib.util, "find_spec", find_spec)
    monkeypatch.chdir(tmp_path)
    assert cli.main([name]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"jax_mps: {module} not installed")
    assert f"[{name}]" in line
    assert not list(tmp_path.iterdir())


def test_demo_takes_a_path_and_a_seed(monkeypatch, tmp_path):
    seen = {}

    def run(options):
        seen.update(vars(options))
        return 0

    monkeypatch.setattr(cli.demo, "run", run)
    assert cli.main(["demo", "--output", str(tmp_path / "x.png"), "--seed", "3"]) == 0
    assert (seen["output"], seen["seed"]) == (tmp_path / "x.png", 3)
