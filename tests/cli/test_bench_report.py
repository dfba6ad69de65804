"""What the benchmark makes of timings: means, worst rows, ratios, and reports that were written before."""

import json

import pytest

from jax_mps.cli.bench import summary
from jax_mps.cli.bench.report import Report, markdown
from jax_mps.cli.bench.runner import Result, Timing

CONTENDERS = ("native", "lax", "torch", "torch_channels_last")


def _result(shape, op, *times, dtype="float32"):
    """Milliseconds of the contenders; None for one that was not timed."""
    timings = {n: Timing(t, t, t, 3) for n, t in zip(CONTENDERS, times, strict=True) if t is not None}
    return Result(shape, shape, op, dtype, "channels_last", 1000, timings, {})


RESULTS = [
    _result("a", "forward", 1.0, 2.0, 4.0, 3.0),
    _result("a", "keep", 2.0, 4.0, 1.0, 8.0),
    _result("b", "forward", 1.0, 8.0, 6.0, None),
    _result("b", "keep", 4.5, None, 9.0, 9.0),
]


def test_means_and_worst_rows():
    means, worst, own = summary.tables(RESULTS, CONTENDERS)
    assert means.rows == [
        ["forward", "4.00", "4.90", "3.00", "4.24"],  # of (2, 8), (4, 6), (3,), (3, 6)
        ["keep", "2.00", "1.00", "2.83", "1.00"],  # of (2,), (0.5, 2), (4, 2), (0.5, 2)
        ["all", "3.17", "2.21", "2.88", "2.06"],
    ]
    assert worst.rows == [
        ["forward", "stock JAX", "a", "channels_last", "2.00"],
        ["forward", "PyTorch", "a", "channels_last", "3.00"],
        ["keep", "stock JAX", "a", "channels_last", "2.00"],
        ["keep", "PyTorch", "a", "channels_last", "0.50"],
    ]
    assert own.rows == [["keep", "forward", "b", "channels_last", "4.50", "3.00"]]


def test_types_are_summed_up_apart_and_compared_with_float32():
    half = _result("b", "forward", 0.5, 8.0, None, None, dtype="bfloat16")
    means, worst, own = summary.tables([*RESULTS, half], CONTENDERS)
    assert [row[0] for row in means.rows] == ["forward", "keep", "forward, bfloat16", "all"]
    assert means.rows[2] == ["forward, bfloat16", "16.00", "-", "-", "-"]
    assert worst.rows[-1] == ["forward, bfloat16", "stock JAX", "b", "channels_last", "16.00"]
    assert own.rows[1:] == [["forward, bfloat16", "forward", "b", "channels_last", "0.50", "0.50"]]


def test_nobody_to_compare_with():
    means, *others = summary.tables([_result("a", "step", 1.0, None, None, None)], ("native",))
    assert means.rows == [["step"], ["all"]]
    assert not others


def _report(**changes):
    fields = {"machine": "m", "versions": {}, "date": "2026-11-28", "contenders": CONTENDERS, "copy_gbs": 9.0}
    return Report(**fields, results=RESULTS, **changes)


def test_a_report_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "report.json"
    _report(seed=4).save(path)
    read = Report.load(path)
    assert (read.results, read.seed) == (RESULTS, 4)
    assert markdown(read) == markdown(_report(seed=4))


def test_reports_of_format_2_have_the_names_of_today(tmp_path):
    path = tmp_path / "report.json"
    _report().save(path)
    written = json.loads(path.read_text())
    del written["seed"]
    for result, op in zip(written["results"], ("gradient", "step", "forward", "train_step"), strict=True):
        result["op"] = op
    path.write_text(json.dumps(written | {"format": 2}))
    assert [r.op for r in Report.load(path).results] == ["pull_back", "loss_step", "forward", "train_step"]
    path.write_text(json.dumps(written | {"format": 1}))
    with pytest.raises(ValueError, match="not a report of format 2 or 3"):
        Report.load(path)
