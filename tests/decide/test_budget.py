"""Allocation: budgets hold on exact costs, floors hold, optimal on small cases."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import images, trained
from torch import nn

from nncf_compactprune.channels import trace
from nncf_compactprune.cut.depth import with_branches
from nncf_compactprune.decide.budgets import (
    AllocationProblem,
    Limits,
    allocate,
    allowed_widths,
    capacity_lost,
    choose,
    compactprune_allocations,
)
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.run.networks.digits_net import digits_net

ALLOCATIONS = compactprune_allocations()
ANY_DEPTH = Limits(min_channels=0, max_ratio=0.9)


@pytest.fixture(scope="module")
def graph():
    return trace(trained("residual"), images())


def random_scores(graph, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.random(g.size) + 0.1 for g in graph.groups]


def problem(graph, *, macs=1.0, params=1.0, limits=None, prunable=None):
    budgets = {"macs": int(macs * graph.macs), "params": int(params * graph.params)}
    return AllocationProblem(graph, prunable or [True] * len(graph.groups), budgets, limits or Limits())


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_budgets_hold_and_are_used(graph, method, share):
    p = problem(graph, macs=share, params=0.8)
    widths = ALLOCATIONS[method](p, random_scores(graph))
    macs, params = graph.cost.macs(widths), graph.cost.params(widths)
    assert macs <= share * graph.macs
    assert params <= 0.8 * graph.params
    assert macs >= 0.8 * share * graph.macs or params >= 0.8 * 0.8 * graph.params


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_no_budget_keeps_everything(graph, method):
    np.testing.assert_array_equal(ALLOCATIONS[method](problem(graph), random_scores(graph)), graph.sizes)


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_a_tighter_budget_never_keeps_more(graph, method):
    scores = random_scores(graph)
    costs = [graph.cost.macs(ALLOCATIONS[method](problem(graph, macs=s), scores)) for s in (0.9, 0.7, 0.5, 0.3, 0.2)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_floors_rounding_and_left_out_groups(graph, method):
    limits = Limits(min_channels=6, max_ratio=0.7, round_to=4)
    prunable = [True] * len(graph.groups)
    prunable[1] = False
    p = problem(graph, macs=0.6, limits=limits, prunable=prunable)
    widths = ALLOCATIONS[method](p, random_scores(graph))
    assert widths[1] == graph.sizes[1]
    for group, width in zip(graph.groups, widths, strict=True):
        assert width >= max(6, 0.3 * group.size)
        assert width % 4 == 0 or width == group.size


def test_impossible_budget_states_the_reachable_minimum(graph):
    with pytest.raises(
        BudgetError, match=r"macs of at most .* cannot be reached.*min_channels=14.*the least is [\d,]+ \(\d+"
    ):
        problem(graph, macs=0.1, limits=Limits(min_channels=14))


def test_the_stated_minimum_is_reachable(graph):
    limits = Limits(min_channels=3)
    floor = np.array([3.0] * len(graph.groups))
    least = graph.cost.macs(floor)
    exact = AllocationProblem(graph, [True] * len(graph.groups), {"macs": least}, limits)
    for method in ALLOCATIONS.values():
        np.testing.assert_array_equal(method(exact, random_scores(graph)), floor)


def test_round_to_counts_positions_of_the_producer():
    graph = trace(trained("grouped"), images())
    group = next(g for g in graph.groups if g.name == "features.1.0")  # 8 channels of 4 positions each
    assert allowed_widths(group, Limits(round_to=8)).tolist() == [2, 4, 6, 8]


def test_automatic_rounding_leaves_narrow_groups_every_width_and_wide_ones_vector_units(graph):
    for group in graph.groups:
        assert group.size < 128
        steps = set(np.diff(allowed_widths(group, Limits(round_to="auto"))[:-1]))
        assert steps <= ({1} if group.size < 32 else {1 << (group.size // 8).bit_length() - 1})
    layers = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 192, 1), nn.Conv2d(192, 32, 1), nn.Conv2d(32, 2, 1)
    wide = trace(nn.Sequential(*layers), torch.randn(2, 3, 4, 4))
    assert [set(np.diff(allowed_widths(g, Limits(round_to="auto")))) for g in wide.groups[:3]] == [{32}, {16}, {4}]
    widths = ALLOCATIONS["uniform"](problem(graph, macs=0.5, limits=Limits(round_to="auto")), random_scores(graph))
    assert graph.cost.macs(widths) <= 0.5 * graph.macs


def test_uniform_gives_what_rounding_left_to_the_narrowest_shares(graph):
    p = problem(graph, macs=0.5, limits=Limits(round_to=4))
    widths = ALLOCATIONS["uniform"](p, random_scores(graph))
    for group in range(len(widths)):
        wider = widths.copy()
        wider[group] = p.round_up(group, widths[group] + 1)
        assert wider[group] == widths[group] or not p.fits(wider)


def test_balanced_is_close_to_the_best_of_all_allocations():
    """Brute force over all widths of a three-group net with steps of 2: the product of what layers keep is largest."""
    graph = trace(trained("plain"), images())
    for seed in range(5):
        scores = random_scores(graph, seed)
        p = problem(graph, macs=0.5, limits=Limits(round_to=2, min_channels=2))
        lost = capacity_lost(p, [np.cumsum(np.sort(s)) for s in scores])

        def total(widths, lost=lost, graph=graph):
            return sum(curve[g.size - int(w)] for curve, g, w in zip(lost, graph.groups, widths, strict=True))

        best = min(total(w) for w in itertools.product(*p.allowed) if p.fits(np.array(w, float)))
        found = total(ALLOCATIONS["balanced"](p, scores))
        assert found <= 1.35 * best
        assert found <= total(ALLOCATIONS["greedy"](p, scores)) + 1e-9


def test_capacity_lost_is_minus_log_of_what_every_side_keeps(graph):
    scores = random_scores(graph)
    curves = capacity_lost(problem(graph, macs=0.5), [np.cumsum(np.sort(s)) for s in scores])
    for group, score, curve in zip(graph.groups, scores, curves, strict=True):
        sides = group.with_role("producer", "consumer")
        whole = [m for m in sides if m.indices.size == graph.parameters[m.parameter][m.dim]]
        if len(whole) == len(sides):
            kept = np.sort(score)[group.size // 2 :].sum() / score.sum()
            assert curve[group.size // 2] == pytest.approx(-len(sides) * np.log(kept))
        assert curve[0] == 0
        assert (np.diff(curve, 2)[:-1] >= -1e-9).all()


def test_uniform_takes_the_same_share(graph):
    widths = ALLOCATIONS["uniform"](problem(graph, macs=0.5), random_scores(graph))
    shares = widths / graph.sizes
    assert shares.max() - shares.min() <= 1 / graph.sizes.min()


def test_global_ranking_cuts_the_weakest_group_most(graph):
    scores = [np.full(g.size, 1.0) for g in graph.groups]
    scores[0] = np.linspace(0.0, 2.0, graph.groups[0].size)
    scores[1] = np.linspace(0.9, 1.1, graph.groups[1].size)
    widths = ALLOCATIONS["global"](problem(graph, macs=0.8), scores)
    assert widths[0] / graph.sizes[0] < widths[1] / graph.sizes[1]


@pytest.mark.parametrize("method", ["global", "greedy"])
def test_the_normalizer_says_how_groups_compare(graph, method):
    scores = random_scores(graph)
    scores[0] = scores[0] * 100

    def widths(normalizer, scores=scores):
        p = problem(graph, macs=0.5)
        p.normalizer = normalizer
        return ALLOCATIONS[method](p, scores)

    for normalizer in ("mean", "max", "sum"):
        np.testing.assert_array_equal(widths(normalizer), widths(normalizer, random_scores(graph)))
    assert widths("none")[0] == graph.sizes[0]
    assert widths("mean")[0] < graph.sizes[0]
    np.testing.assert_allclose(problem(graph).normalized(scores)[0].mean(), 1)


def test_greedy_is_close_to_the_best_of_all_allocations():
    """Brute force over all widths of a three-group net with steps of 4."""
    graph = trace(trained("plain"), images())
    limits = Limits(round_to=4, min_channels=4)
    for seed in range(5):
        scores = random_scores(graph, seed)
        p = problem(graph, macs=0.5, limits=limits)
        kept = [np.concatenate([[0], np.cumsum(np.sort(s / s.mean())[::-1])]) for s in scores]

        def value(widths, kept=kept):
            return sum(k[int(w)] for k, w in zip(kept, widths, strict=True))

        best = max(value(w) for w in itertools.product(*p.allowed) if p.fits(np.array(w, float)))
        found = value(ALLOCATIONS["greedy"](p, scores))
        assert found >= 0.9 * best
        assert found >= value(ALLOCATIONS["uniform"](p, scores)) - 1e-9


def test_choose_keeps_the_highest_and_breaks_ties_by_position():
    keep = choose(np.array([2.0]), [np.array([1.0, 3.0, 1.0, 1.0])])
    assert keep[0].tolist() == [True, True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(16)))
def test_choice_follows_a_permutation_of_the_scores(graph, order):
    scores = np.random.default_rng(0).permutation(16).astype(float)
    kept = choose(np.array([7.0]), [scores])[0]
    permuted = choose(np.array([7.0]), [scores[list(order)]])[0]
    np.testing.assert_array_equal(permuted, kept[list(order)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda problem, scores: problem.sizes, "its widths exceed a budget"),
        (lambda problem, scores: problem.floor[:-1], "are not one allowed width for every group"),
        (lambda problem, scores: problem.floor + 0.5, "are not one allowed width for every group"),
    ],
)
def test_a_wrong_allocation_is_refused(graph, wrong, words):
    with pytest.raises(BudgetError, match=rf"test_budget:<lambda>: .*{words}|{words}"):
        allocate(problem(graph, macs=0.5), random_scores(graph), wrong)


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    model, x = digits_net().eval(), torch.randn(1, 1, 16, 16)
    return with_branches(model, trace(model, x), x)


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.02])
def test_branches_go_whole_or_stay(deep, method, share):
    p = problem(deep, macs=share, limits=ANY_DEPTH)
    widths = ALLOCATIONS[method](p, random_scores(deep))
    assert p.fits(widths)
    assert p.allows(widths)
    for index, width in enumerate(widths):
        assert width >= np.ceil(0.1 * deep.groups[index].size) or (width == 0 and index in deep.in_branches)
    if share == 0.02:  # below what widths alone can do
        assert not widths.all()
        with pytest.raises(BudgetError, match="min_channels=1"):
            problem(deep, macs=share, limits=Limits(max_ratio=0.9))


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_without_being_asked_no_branch_goes(deep, method):
    graph = dataclasses.replace(deep, branches={}, keep_one={})
    scores = random_scores(deep)
    limits = Limits(max_ratio=0.9)
    with_them = ALLOCATIONS[method](problem(deep, macs=0.1, limits=limits), scores)
    np.testing.assert_array_equal(with_them, ALLOCATIONS[method](problem(graph, macs=0.1, limits=limits), scores))
    assert with_them.all()


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_depth_alone_takes_no_branch_too_many(deep, method):
    p = problem(deep, macs=0.7, limits=Limits(min_channels=0, max_ratio=0))
    widths = ALLOCATIONS[method](p, random_scores(deep))
    assert p.allows(widths)
    gone = [groups for groups in deep.branches.values() if not widths[list(groups)].any()]
    assert gone
    for groups in gone:
        trial = widths.copy()
        trial[list(groups)] = deep.sizes[list(groups)]
        assert deep.cost.macs(trial) > 0.7 * deep.macs


def test_a_branch_out_of_scope_stays(deep):
    groups = next(groups for groups in deep.branches.values() if len(groups) > 1)
    prunable = [index != groups[0] for index in range(len(deep.groups))]
    p = problem(deep, macs=0.5, limits=ANY_DEPTH, prunable=prunable)
    assert len(p.branches) == len(deep.branches) - 1
    widths = p.floor.copy()
    widths[list(groups)] = 0
    assert p.allows(p.floor)
    assert not p.allows(widths)
