"""The schedules of NNCF 2.x's filter pruning, against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from nncf_compactprune.algorithms.filter_pruning.schedules import bias_is_possible, level


def levels(schedule, initial, target, steps, epochs):
    return [level(schedule, e, initial=initial, target=target, steps=steps) for e in range(epochs)]


def test_baseline_is_there_at_once():
    assert levels("baseline", 0.1, 0.4, 15, 2) == [0.4, 0.4]


def test_exponential_divides_what_is_left_by_the_same_factor():
    found = levels("exponential", 0.1, 0.4, 15, 17)
    assert found[0] == pytest.approx(0.1)
    assert found[14:] == pytest.approx([0.4] * 3)
    left = [1 - f for f in found[:15]]
    assert [b / a for a, b in pairwise(left)] == pytest.approx([(0.6 / 0.9) ** (1 / 14)] * 14)


@pytest.mark.parametrize(("initial", "target", "steps"), [(0.0, 0.5, 9), (0.1, 0.4, 17), (0.3, 0.41, 33)])
def test_exponential_with_bias_passes_its_three_points(initial, target, steps):
    found = levels("exponential_with_bias", initial, target, steps, steps + 2)
    assert found[0] == pytest.approx(initial)
    assert found[(steps - 1) // 8] == pytest.approx(0.75 * target, abs=1e-6)
    assert found[steps - 1 :] == pytest.approx([target] * 3)
    assert all(a <= b for a, b in pairwise(found))
    # the steps shrink or grow by one factor: a·exp(-k·epoch) + b
    steps_between = [b - a for a, b in pairwise(found[:steps])]
    factors = [b / a for a, b in pairwise(steps_between)]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-4)


def test_exponential_with_bias_needs_a_start_below_three_quarters_of_the_target():
    assert bias_is_possible(0.29, 0.4)
    assert not bias_is_possible(0.31, 0.4)
    assert bias_is_possible(0.5, 0.4)  # the target at once


@pytest.mark.parametrize("schedule", ["exponential", "exponential_with_bias"])
@pytest.mark.parametrize("steps", [0, 1])
def test_one_epoch_is_the_target(schedule, steps):
    assert levels(schedule, 0.0, 0.5, steps, 1) == [0.5]


def test_a_start_above_the_target_is_the_target():
    assert levels("exponential", 0.95, 0.1, 10, 1) == [0.1]
    assert math.isclose(levels("exponential", 0.0, 0.0, 10, 1)[0], 0.0)
