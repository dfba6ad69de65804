"""`python -m jax_mps run`: tiny programs in processes of their own, beside what Python does with them."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jax_mps
from jax_mps import __main__ as cli

WHO = "import sys; print(sys.argv, sys.path[0], __name__, globals().get('__file__'), __spec__ is None)\n"
POOL = """
import sys
import jax, jax.numpy as jnp
from jax import lax
image, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
y = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
print(y.sum())
"""


def _process(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    places = [str(Path(jax_mps.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONSAFEPATH")}
    search = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=inherited | search | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return _process(folder, *arguments)


def ours(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return _process(folder, "-m", "jax_mps", "run", *arguments, **environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with programs of every kind, and one that imports its neighbour."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "who.py").write_text("import neighbour\n" + WHO)
    (tmp_path / "sub" / "neighbour.py").write_text("")
    (tmp_path / "module.py").write_text(WHO)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(WHO)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import not_there_either")
    (tmp_path / "broken" / "part.py").write_text("")
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.writestr("__main__.py", WHO)
    (tmp_path / "pool.py").write_text(POOL)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("sub/who.py", "--report", "-m", "--", "x"),
        ("-m", "module", "--report", "-m", "x"),
        ("-m", "package", "x"),
        ("{folder}/package",),
        ("{folder}/program.zip", "--x"),
    ],
    ids=" ".join,
)
def test_a_program_sees_what_python_shows_it(folder, arguments):
    arguments = [argument.format(folder=folder) for argument in arguments]
    expected, run = python(folder, *arguments), ours(folder, *arguments)
    assert (run.returncode, run.stdout) == (0, expected.stdout)
    assert run.stderr in ("", expected.stderr) or "replaces nothing" in run.stderr


@pytest.mark.parametrize(
    "arguments", [("nothing.py",), ("-m", "nothing"), ("-m", "nothing.at_all")], ids=" ".join
)
def test_what_is_missing_is_said_as_python_says_it(folder, arguments):
    expected, run = python(folder, *arguments), ours(folder, *arguments)
    assert (run.returncode, run.stdout) == (expected.returncode, "")
    if arguments[-1] != "nothing.at_all":  # Python tells how it looked, too
        assert expected.stderr.strip().split(": ", 1)[1] in run.stderr
    assert "No module named nothing" in run.stderr or "[Errno 2] No such file or directory" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit('sorry')", 1, "sorry"),
        ("sys.exit()", 0, ""),
        ("raise ValueError('sorry')", 1, "ValueError: sorry"),
        (
            "def f() -> NotThere: pass",
            1,
            "NameError: name 'NotThere' is not defined",
        ),  # no future is inherited
        ("1 +", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_the_end_of_a_program_is_its_own(folder, end, status, said):
    (folder / "end.py").write_text(f"import sys\n{end}\n")
    run = ours(folder, "--report", "end.py")
    assert run.returncode == status
    assert said in run.stderr
    assert ("Traceback" in run.stderr) == (": " in said)
    if jax_mps.native_available():
        assert run.stderr.endswith("nothing that accelerate() knows was lowered\n")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "end", ["", *(pytest.param(end, marks=pytest.mark.full) for end in ("sys.exit(3)", "raise ValueError"))]
)
def test_the_report_says_what_was_replaced(folder, end):
    (folder / "pool.py").write_text(f"{POOL}{end}\n")
    run = ours(folder, "--report", "pool.py")
    assert run.stdout == python(folder, "pool.py").stdout
    table = run.stderr[run.stderr.index("times ") :].splitlines()
    assert re.search(
        r"conv_general_dilated +float32\[1,8,8,4\] float32\[3,3,4,4\] +float32\[1,8,8,4\]", table[1]
    )
    assert re.fullmatch(r"\d+ of \d+ by jax_mps", table[-1])
    assert "by jax_mps" not in ours(folder, "pool.py").stderr


def test_a_package_that_fails_says_why(folder):
    run = ours(folder, "-m", "broken.part")
    assert run.returncode == 1
    assert "ModuleNotFoundError: No module named 'not_there_either'" in run.stderr


def test_the_program_may_still_set_jax_up(folder):
    """Nothing has touched a device when a program begins."""
    (folder / "devices.py").write_text(
        "import os\nos.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'\n"
        "import jax\nprint(len(jax.devices()))\n"
    )
    assert ours(folder, "devices.py").stdout == "3\n"


def test_without_the_library(folder):
    run = ours(folder, "pool.py", JAX_MPS_NATIVE="off")
    assert (run.returncode, run.stdout) == (0, python(folder, "pool.py").stdout)
    assert "accelerate() replaces nothing on the CPU: JAX_MPS_NATIVE=off" in run.stderr


def test_a_library_that_is_required_and_missing(folder):
    (folder / "jax_mps_native.py").write_text("raise ImportError")
    run = ours(folder, "module.py", JAX_MPS_NATIVE="required")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("jax_mps: JAX_MPS_NATIVE=required, but the native library was not built")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("arguments", [(), ("--report",), ("-m",), ("--unknown", "x.py")], ids=" ".join)
def test_wrong_use_has_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["run", *arguments])
    assert raised.value.code == 2
    assert "usage: python -m jax_mps" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["run", "--help"])
    assert raised.value.code == 0
    assert "--report" in capsys.readouterr().out
