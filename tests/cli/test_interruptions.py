"""Ctrl-C, full disks and folders without permission: an end at once or one clear line, and whole files."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from command_line import JSON, interruptible, start, wait
from jax_mps import _files, mps
from jax_mps.cli import interrupts

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
OLD = "what was there before"


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# --- Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("bench", *JSON), ("demo", "--output", "picture.png")], ids=lambda c: c[0]
)
def test_an_interrupt_ends_a_command(command, tmp_path):
    file = tmp_path / command[-1]
    file.write_text(OLD)
    process = start(*command, folder=tmp_path)
    process.stderr.readline() if command[0] == "bench" else process.stdout.readline()
    process.send_signal(signal.SIGINT)
    ended = wait(process)
    assert ended.status == 130, ended
    assert "Traceback" not in ended.output
    assert file.read_text() == OLD
    assert names(tmp_path) == [file.name]


SLOW = """
import os, signal, time
from jax_mps.cli import interrupts
with interrupts.end_at_once():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        {then}
"""


@pytest.mark.parametrize("then", ["time.sleep(60)", "raise"], ids=["late", "in time"])
def test_an_interrupt_that_python_is_slow_to_see_ends_all_the_same(then):
    with interruptible():
        run = subprocess.run(
            [sys.executable, "-c", SLOW.format(then=then)],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert (run.returncode, run.stderr) == (130, "")


def test_without_an_interrupt_nothing_is_left():
    before, threads = signal.set_wakeup_fd(-1), set(threading.enumerate())
    with interrupts.end_at_once():
        (own,) = set(threading.enumerate()) - threads
    assert signal.set_wakeup_fd(before) == -1
    own.join(timeout=60)
    assert not own.is_alive()


@pytest.mark.parametrize("caught", [True, False])
def test_what_a_program_does_with_an_interrupt_is_its_own_affair(caught, tmp_path):
    lines = ["import os, signal", "os.kill(os.getpid(), signal.SIGINT)", "import time", "time.sleep(60)"]
    if caught:
        lines = [
            "try:",
            *(f"    {line}" for line in lines),
            "except KeyboardInterrupt:",
            "    print('saved')",
        ]
    (tmp_path / "program.py").write_text("\n".join(lines))
    ours = wait(start("run", "program.py", folder=tmp_path))
    with interruptible():
        python = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ours.status == python.returncode == (0 if caught else -signal.SIGINT)
    assert ours.output.splitlines()[-1] == (python.stdout + python.stderr).splitlines()[-1]


# --- files that cannot be written ---------------------------------------------------------------------


def refusal(command: tuple[str, ...], folder: Path, **options: int) -> str:
    """The one line on standard error of a command that fails for its file."""
    ended = wait(start(*command, folder=folder, **options))
    assert ended.status == 1, ended
    line = next(line for line in ended.output.splitlines() if line.startswith("jax_mps: "))
    assert "Traceback" not in ended.output
    return line


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/bench.json", "Not a directory"),
        ("nowhere/bench.json", "No such file or directory"),
        ("folder", "Is a directory"),
    ],
)
def test_bench_says_at_once_that_it_cannot_write(path, reason, tmp_path, capsys):
    from jax_mps import __main__ as cli

    (tmp_path / "file").write_text(OLD)
    (tmp_path / "folder").mkdir()
    assert cli.main(["bench", *JSON[:-1], str(tmp_path / path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"jax_mps: cannot write {tmp_path / path}: {reason}"
    assert names(tmp_path) == ["file", "folder"]


@LINUX
def test_bench_on_a_full_device(tmp_path):
    command = ("bench", *JSON[:-1], "/dev/full")
    assert refusal(command, tmp_path) == "jax_mps: cannot write /dev/full: No space left on device"


def test_bench_on_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "bench.json").write_text(OLD)
    assert refusal(("bench", *JSON), tmp_path, blocks=0) == "jax_mps: cannot write bench.json: File too large"
    assert (tmp_path / "bench.json").read_text() == OLD
    assert names(tmp_path) == ["bench.json"]


@pytest.mark.parametrize(("path", "status"), [("nowhere/picture.png", 1), ("picture.txt", 2)])
def test_demo_says_before_it_trains_that_it_cannot_draw(path, status, tmp_path, capsys):
    from jax_mps import __main__ as cli

    assert cli.main(["demo", "--output", str(tmp_path / path)]) == status
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("jax_mps: ")
    assert str(tmp_path / path) in line
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"format": 1}', '{"format": 3}', "\x00"])
def test_bench_cannot_print_what_is_no_report(text, tmp_path, capsys):
    from jax_mps import __main__ as cli

    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["bench", "--markdown", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jax_mps: cannot read {path}: ")


@LINUX
@pytest.mark.parametrize("command", [("info",), ("lower", "max_pool", "--shape", "2,16,16,3", "--second")])
def test_output_that_cannot_be_written_is_one_line(command, tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        run = subprocess.run(
            [sys.executable, "-m", "jax_mps", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=240, check=False,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "jax_mps: cannot write standard output: No space left on device"
    assert "Traceback" not in run.stderr


# --- files that are whole -----------------------------------------------------------------------------


def test_a_file_is_replaced_and_keeps_its_mode_and_its_links(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text(OLD)
    path.chmod(0o640)
    link.symlink_to(path)
    _files.replace(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    _files.check(link)
    _files.replace(tmp_path / ("x" * 255), b"")
    assert names(tmp_path) == ["file", "link", "x" * 255]


def test_a_pipe_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    _files.check(tmp_path / "pipe")
    _files.replace(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_a_file_without_permission_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text(OLD)
    monkeypatch.setattr(os, "access", lambda *_: False)  # who is root may write everything
    for function in (lambda: _files.replace(path, b"new"), lambda: _files.check(path)):
        with pytest.raises(PermissionError):
            function()
    assert path.read_text() == OLD


def test_a_picture_is_never_half_written(tmp_path):
    kernel = mps.MPSCNNPoolingMax(kernel_width=2, kernel_height=2)
    picture = mps.draw_windows(kernel, (1, 4, 4, 1), (1, 2, 2, 1))
    path = tmp_path / "picture.svg"
    path.write_text(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            picture.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == OLD
    assert names(tmp_path) == ["picture.svg"]
    picture.save(path)
    assert path.read_text() == picture.svg
