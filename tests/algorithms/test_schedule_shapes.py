"""The built-in schedules."""

from __future__ import annotations

import pytest

from nncf_compactprune.algorithms.filter_pruning.schedules import level
from nncf_compactprune.algorithms.schedules import exponential_with_bias, polynomial
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.plugins import default_plugins

RISING = ["exponential", "exponential_with_bias", "polynomial", "multistep"]


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize(("initial", "target"), [(0.0, 0.8), (0.1, 0.5)])
def test_they_rise_from_the_start_to_the_target(name, initial, target) -> None:
    schedule = default_plugins().resolve("schedules", name)
    rates = [schedule(epoch, initial=initial, target=target, steps=6) for epoch in range(9)]
    assert rates[0] == pytest.approx(initial)
    assert rates == sorted(rates)
    assert rates[5] < target
    assert rates[6:] == [target] * 3
    assert schedule(0, initial=0.6, target=0.5, steps=6) == 0.5


def test_one_shot_is_the_target() -> None:
    assert default_plugins().resolve("schedules", "one_shot")(0, initial=0.1, target=0.7, steps=9) == 0.7


def test_formulas() -> None:
    assert polynomial(1, initial=0.1, target=0.5, steps=2) == pytest.approx(0.5 - 0.4 / 8)
    biased = exponential_with_bias(1, initial=0.0, target=0.8, steps=8)
    assert biased == pytest.approx(0.6)  # three quarters after an eighth
    assert biased == level("exponential_with_bias", 1, initial=0.0, target=0.8, steps=9)
    with pytest.raises(
        BudgetError, match=r'pruning_init is 0\.450\. Set it below 0\.375, or "schedule": "exponential"'
    ):
        exponential_with_bias(0, initial=0.45, target=0.5, steps=8)
