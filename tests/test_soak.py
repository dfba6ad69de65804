"""The driver of `.ci/soak`, on parts that fail, crash and hang on purpose."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from soak.record import Record, command

PLANTED = {
    "right": "assert case['n'] >= 0",
    "wrong": "assert case['n'] % 5 != 3",
    "broken": "return )",
    "crashing": "import os, signal\n    if case['n'] == 4: os.kill(os.getpid(), signal.SIGSEGV)",
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of the driver with parts of ours."""
    shutil.copytree(Path(soak.__file__).parent, tmp_path / "soak")
    (tmp_path / "soak/__init__.py").write_text(f"PARTS = {dict.fromkeys(PLANTED, 1)}\n")
    for name, check in PLANTED.items():
        (tmp_path / f"soak/{name}.py").write_text(
            "import time\n"
            "def step(seed, number, check):\n    time.sleep(0.01)\n    check({'n': number})\n"
            f"def check(case):\n    {check}\n"
        )
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "soak", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_run_reports_failures_and_crashes_and_goes_on(planted):
    hours = ("--hours", str(3 / 3600), "--state", "state")
    first = run(planted, *hours)
    assert first.returncode == 1, first.stdout + first.stderr
    for case in (command("wrong", {"n": 3}), command("crashing", {"n": 4})):
        assert f"FAILED {case}" in first.stdout
    assert "FAILED .ci/soak --part right" not in first.stdout
    records = {name: Record.read(planted / f"state/{name}.json", seed=0) for name in PLANTED}
    (failure,) = records.pop("broken").failures  # it does not start, and is not tried again
    assert "status 1" in failure["error"]
    assert all(record.next_step > 4 for record in records.values()), records
    assert records["right"].cases == records["right"].next_step
    assert "status -11" in records["crashing"].failures[0]["error"]
    assert len(records["crashing"].failures) == 1  # the step is not run again, the next ones are

    second = run(planted, *hours)
    assert f"FAILED {command('wrong', {'n': 3})}" in second.stdout  # the report adds up
    again = Record.read(planted / "state/right.json", seed=0)
    assert again.next_step > records["right"].next_step
    assert again.seconds > records["right"].seconds
    assert Record.read(planted / "state/right.json", seed=1) == Record(1)


def test_a_case_repeats_by_itself(planted):
    assert run(planted, "--part", "wrong", "--case", json.dumps({"n": 2})).returncode == 0
    failing = run(planted, "--part", "wrong", "--case", json.dumps({"n": 3}))
    assert failing.returncode == 1
    assert "AssertionError" in failing.stderr


def test_every_part_is_there():
    for part in soak.PARTS:
        assert (Path(soak.__file__).parent / f"{part}.py").exists(), part
