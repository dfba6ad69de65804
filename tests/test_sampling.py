"""The sample of large grids: small, the same for a seed, and with every value."""

import itertools
import random

import sampling


def grid(**values):
    return [dict(zip(values, case, strict=True)) for case in itertools.product(*values.values())]


CASES = grid(name=range(100), op=["max", "average", "l2"], path=["native", "xla"], layout=["last", "first"])


def chosen(cases, seed):
    return [cases[i] for i in sampling.sample(cases, random.Random(seed))]


def test_small_grids_are_whole():
    cases = grid(name=range(sampling.MOST_CASES))
    assert chosen(cases, 0) == cases


def test_a_sample_is_small_and_has_no_case_twice():
    for seed in range(20):
        some = sampling.sample(CASES, random.Random(seed))
        assert len(set(some)) == len(some) == sampling.MOST_CASES


def test_every_pair_of_values_of_small_parameters_is_met():
    for seed in range(20):
        some = chosen(CASES, seed)
        for a, b in itertools.combinations(("op", "path", "layout"), 2):
            assert {(c[a], c[b]) for c in some} == {(c[a], c[b]) for c in CASES}


def test_every_value_is_met_though_rare():
    cases = [*CASES, {"name": 0, "op": "unpool", "path": "xla", "layout": "last"}]
    for seed in range(20):
        assert "unpool" in {case["op"] for case in chosen(cases, seed)}


def test_the_seed_chooses():
    assert chosen(CASES, 1) == chosen(CASES, 1)
    assert chosen(CASES, 1) != chosen(CASES, 2)
