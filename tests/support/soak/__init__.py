"""Hours of random tests, as a release runs them with `.ci/soak`. See docs/dev/reliability.md.

Every module named in `PARTS` is a part and has:

* `step(seed, number, check)`, which calls `check` with the cases of step `number`, seconds to a minute of
  them. The same numbers give the same cases.
* `check(case)`, which raises where something is wrong. A case is what JSON can hold. What it may return are
  counts by name, whose sums are in the report.
"""

PARTS = {
    "differential": 8,
    "stock": 4,
    "mps": 2,
    "hostile": 2,
    "sanitizers": 3,
    "threads": 3,
    "memory": 3,
    "interruptions": 1,
    "mutants": 3,
}
"""The parts, and how the time is shared among them."""
