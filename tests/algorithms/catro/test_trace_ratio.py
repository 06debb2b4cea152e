"""The exact parts of CATRO against exhaustive search, and their laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.networks import images, trained

from nncf_compactprune.algorithms.catro.trace_ratio import (
    RemovalCurve,
    damped,
    joint_removal,
    trace_ratio,
    trace_ratio_curve,
)
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.budgets import AllocationProblem, Limits, lazy_greedy

SCATTERS = npst.arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 1e3, allow_subnormal=False))


def subsets(size: int, width: int) -> list[list[int]]:
    return [list(chosen) for chosen in itertools.combinations(range(size), width)]


def ratio(between: np.ndarray, within: np.ndarray, chosen: list[int]) -> float:
    b, w = between[chosen].sum(), within[chosen].sum()
    with np.errstate(over="ignore"):
        return b / w if w > 0 else (math.inf if b > 0 else 0.0)


# -- stage 2: the trace ratio ----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.data())
def test_trace_ratio_is_the_best_of_all_subsets_and_never_falls(data: st.DataObject) -> None:
    """Scatters of one scale: a difference of 1e-17 beside 1 is lost in any sum."""
    scatters = st.integers(0, 10**6).map(lambda n: n / 1e3)
    between = data.draw(npst.arrays(np.float64, st.integers(1, 9), elements=scatters))
    size = len(between)
    within = data.draw(npst.arrays(np.float64, size, elements=scatters))
    width = data.draw(st.integers(1, size))
    found = trace_ratio(between, within, width)
    best = max(ratio(between, within, chosen) for chosen in subsets(size, width))
    assert found.kept.sum() == width
    assert ratio(between, within, np.flatnonzero(found.kept).tolist()) == pytest.approx(best, rel=1e-9)
    assert found.ratio == pytest.approx(best, rel=1e-9)
    assert list(found.history) == sorted(found.history)


@settings(max_examples=200)
@given(st.data())
def test_trace_ratio_of_any_scatters_ends_and_is_that_of_its_subset(data: st.DataObject) -> None:
    between = data.draw(SCATTERS)
    within = data.draw(npst.arrays(np.float64, len(between), elements=st.floats(0, 1e3, allow_subnormal=False)))
    width = data.draw(st.integers(1, len(between)))
    found = trace_ratio(between, within, width)
    assert found.kept.sum() == width
    assert found.ratio == pytest.approx(ratio(between, within, np.flatnonzero(found.kept).tolist()), rel=1e-9)
    assert list(found.history) == sorted(found.history)


def test_trace_ratio_is_not_the_fisher_ranking() -> None:
    """The channel with the best ratio of its own need not be in the best set."""
    between, within = np.array([1.0, 10.0, 9.0, 0.1]), np.array([0.1, 2.0, 1.5, 0.008])
    by_fisher = np.argsort(-between / within)[:2]
    found = trace_ratio(between, within, 2)
    assert set(np.flatnonzero(found.kept)) != set(by_fisher) or found.ratio >= ratio(between, within, list(by_fisher))
    assert found.ratio == max(ratio(between, within, s) for s in subsets(4, 2))
    assert len(found.history) > 1


def test_dead_channels_beat_noisy_ones_in_the_plain_form() -> None:
    """Why the plain form is not the default: scores of strong channels may be negative, those of dead ones are 0."""
    between, within = np.array([8.0, 5.0, 0.0]), np.array([2.0, 9.0, 0.0])
    assert trace_ratio(between, within, 2).kept.tolist() == [True, False, True]


def test_constant_features_are_no_reason_to_divide_by_zero() -> None:
    nothing = np.zeros(4)
    assert trace_ratio(nothing, nothing, 2).kept.tolist() == [True, True, False, False]
    perfect = trace_ratio(np.array([0.0, 1.0, 5.0]), np.array([0.0, 0.0, 1.0]), 2)
    assert perfect.ratio == math.inf
    assert perfect.kept.tolist() == [True, True, False]
    curve = trace_ratio_curve(nothing, nothing)
    assert np.isfinite(curve.loss).all()


# -- joint removal -----------------------------------------------------------------------------------------------------


def random_effects(size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(40, size)) * generator.uniform(0.1, 3, size)
    return effects.T @ effects / 40


@pytest.mark.parametrize("seed", range(5))
def test_joint_removal_states_the_loss_of_what_it_removes(seed: int) -> None:
    gram = random_effects(7, seed)
    curve = joint_removal(gram)
    for removed, kept in enumerate(curve.kept):
        gone = ~kept
        assert gone.sum() == removed
        assert curve.loss[removed] == pytest.approx(gram[np.ix_(gone, gone)].sum(), abs=1e-9)
        assert removed == 0 or (curve.kept[removed - 1] >= kept).all()  # nested
    one = [gram[k, k] for k in range(7)]
    assert curve.loss[1] == pytest.approx(min(one))


def test_joint_removal_sees_what_goes_together() -> None:
    """Two channels that do the same look cheap one by one; two that cancel are free together."""
    same = np.array([1.0, 2.0, -1.0, 0.5])
    effects = np.stack([same, same, np.array([1.1, 1.1, 1.1, 1.1]) * np.linalg.norm(same) / 2.2], 1)
    assert joint_removal(effects.T @ effects).kept[2].tolist() != [False, False, True]
    opposite = np.stack([3 * same, -3 * same, 3.1 * same[::-1]], 1)
    assert joint_removal(opposite.T @ opposite).kept[2].tolist() == [False, False, True]


def test_joint_removal_follows_a_permutation() -> None:
    gram, order = random_effects(8, 3), np.random.default_rng(1).permutation(8)
    curve, permuted = joint_removal(gram), joint_removal(gram[np.ix_(order, order)])
    np.testing.assert_allclose(curve.loss, permuted.loss)
    assert (curve.kept[:, order] == permuted.kept).all()


@settings(max_examples=100, deadline=None)
@given(npst.arrays(np.float64, st.integers(1, 12), elements=st.floats(-5, 50)))
def test_the_convex_curve_lies_below_and_its_steps_never_get_cheaper(loss: np.ndarray) -> None:
    loss[0] = 0
    convex = RemovalCurve(loss, np.zeros((len(loss), len(loss)), bool)).convex
    assert (convex <= np.maximum(loss, 0) + 1e-9).all()
    assert (np.diff(convex) >= -1e-9).all()
    assert (np.diff(convex, 2) >= -1e-9).all()


def test_damping_brings_groups_to_one_scale() -> None:
    small, large = random_effects(4, 0), 100 * random_effects(4, 0)
    assert damped(small, 0) is not None
    np.testing.assert_allclose(damped(small, 1), damped(large, 1))
    np.testing.assert_allclose(damped(large, 0.5), 10 * damped(small, 0.5))
    np.testing.assert_array_equal(damped(np.zeros((2, 2)), 0.5), np.zeros((2, 2)))


# -- stage 1: widths ---------------------------------------------------------------------------------------------------


def three_groups(budgets: dict[str, float], **limits: int) -> AllocationProblem:
    graph = trace(trained("plain"), images())
    assert len(graph.groups) == 3
    most = {kind: int(graph.cost[kind](graph.sizes) * share) for kind, share in budgets.items()}
    return AllocationProblem(graph, [True] * 3, most, Limits(**limits))


def curves(problem: AllocationProblem, seed: int) -> list[np.ndarray]:
    return [joint_removal(random_effects(int(n), seed + g)).convex for g, n in enumerate(problem.sizes)]


def loss_of(problem: AllocationProblem, losses: list[np.ndarray], widths: np.ndarray) -> float:
    return sum(float(c[int(n - w)]) for c, n, w in zip(losses, problem.sizes, widths, strict=True))


@pytest.mark.parametrize("budgets", [{"macs": 0.5}, {"params": 0.4}, {"macs": 0.7, "params": 0.3}])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_lazy_greedy_is_close_to_exhaustive_search(budgets: dict[str, float], seed: int) -> None:
    """Within the bound of greedy: what it keeps is at least 1 - 1/e of what the best widths keep."""
    problem = three_groups(budgets, round_to=2)
    losses = curves(problem, seed)
    widths = lazy_greedy(problem, losses)
    assert problem.fits(widths)
    everything = sum(float(c[-1]) for c in losses)
    best = min(
        loss_of(problem, losses, np.array(w, float))
        for w in itertools.product(*problem.allowed)
        if problem.fits(np.array(w, float))
    )
    kept = everything - loss_of(problem, losses, widths)
    assert kept >= (1 - 1 / math.e) * (everything - best)
    assert loss_of(problem, losses, widths) <= 1.15 * best + 1e-9  # and in practice much closer


def test_nothing_could_be_given_back() -> None:
    problem = three_groups({"macs": 0.5})
    widths = lazy_greedy(problem, curves(problem, 0))
    for group, options in enumerate(problem.allowed):
        larger = [o for o in options if o > widths[group]]
        if larger:
            trial = widths.copy()
            trial[group] = larger[0]
            assert not problem.fits(trial)


def test_a_tighter_budget_never_keeps_more_macs() -> None:
    costs = []
    for share in (0.9, 0.6, 0.3, 0.15):
        problem = three_groups({"macs": share})
        widths = lazy_greedy(problem, curves(problem, 0))
        costs.append(problem.graph.cost.macs(widths))
        assert costs[-1] <= share * problem.graph.macs
    assert costs == sorted(costs, reverse=True)


def test_equal_losses_go_where_a_channel_saves_most() -> None:
    problem = three_groups({"macs": 0.8})
    widths = lazy_greedy(problem, [np.arange(n, dtype=float) for n in problem.sizes])
    saving = [problem.graph.cost.macs.saved(problem.sizes, g, 1) for g in range(3)]
    assert widths[int(np.argmax(saving))] < problem.sizes[int(np.argmax(saving))]
    assert widths[int(np.argmin(saving))] == problem.sizes[int(np.argmin(saving))]
    assert torch.is_tensor(torch.tensor(widths))
