from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest
from pages import page
from scipy.stats import hypergeom
from test_clustering import matrix, planted

import modelsim as ms

families = page("families")
BLOCKS = np.repeat(range(3), 8)


def noise_only(n=14, *, seed=0, effects=0.0):
    """Independent pairs, but for what single models add to all of theirs."""
    random = np.random.default_rng(seed)
    own, pairs = random.normal(0, effects, n), np.triu(random.normal(3, 0.2, (n, n)), 1)
    return matrix(np.where(np.eye(n), np.log(100), pairs + pairs.T + own[:, None] + own))


def test_eigenvalues_of_equal_models_and_of_pairs_without_a_link():
    equal = families.eigenvalues(matrix(np.full((5, 5), 2.0)))
    np.testing.assert_allclose(equal, [0, 1.25, 1.25, 1.25, 1.25], atol=1e-12)
    pairs = matrix(np.kron(np.eye(2), np.full((2, 2), 3.0)))
    np.testing.assert_allclose(families.eigenvalues(pairs), [0, 0, 2, 2], atol=1e-12)


@pytest.mark.parametrize("kind", [lambda s: s, ms.relative_sat])
def test_both_rules_pick_the_planted_number_and_starts_agree_there(kind):
    score = kind(planted(np.repeat(range(4), 6)))
    starts = {k: np.stack([ms.spectral_clusters(score, k, seed=s) for s in range(3)]) for k in range(2, 8)}
    rated = pd.DataFrame({k: families.rules(score, k, found) for k, found in starts.items()}).T
    assert rated.idxmax()[:2].tolist() == [4, 4]
    assert rated.loc[4, 2] == 1


def test_noise_is_around_the_given_score_and_has_half_the_spread_of_the_rest():
    score, off = planted(), ~np.eye(9, dtype=bool)
    expected = ms.relative_sat(score).values[off].std() / 2
    copies = np.stack(list(families.perturbed(score, n=400)))
    np.testing.assert_array_equal(copies, copies.transpose(0, 2, 1))
    np.testing.assert_allclose(copies.mean(0), score, atol=0.25 * expected)
    np.testing.assert_allclose(copies.std(0)[off], expected, rtol=0.2)
    assert (copies[:, ~off] == np.log(100)).all()


@pytest.mark.parametrize("kind", [lambda s: s, ms.relative_sat])
def test_shuffled_copies_keep_single_effects_and_the_spread_of_the_rest(kind):
    score, off = kind(planted()), ~np.eye(9, dtype=bool)
    rest = ms.relative_sat(score).values[off]
    first, second = families.shuffled(score, n=2)
    for copy in (first, second):
        means = [np.nanmean(each.where(off), 0) for each in (copy, score)]
        np.testing.assert_allclose(*means, atol=1e-9)
        assert ms.relative_sat(copy).values[off].std() == pytest.approx(rest.std())
        np.testing.assert_array_equal(np.diag(copy), np.diag(score))
    assert not np.allclose(first.values[off], second.values[off])


def test_blocks_are_structure_and_noise_with_effects_of_single_models_is_not():
    assert families.p_of_structure(planted(BLOCKS), (3,), copies=19) == 1 / 20
    noise = [noise_only(seed=seed, effects=0.1 * (seed % 4)) for seed in range(20)]
    p_values = np.array([families.p_of_structure(each, (3,), copies=19)[0] for each in noise])
    assert (p_values <= 0.05).mean() <= 0.15
    assert 0.35 < p_values.mean() < 0.65


@pytest.mark.parametrize("seed", range(3))
def test_gradient_without_groups_is_structure_too_with_the_same_effects_and_spread(seed):
    score = noise_only(40, effects=0.2)
    smooth = families.gradient(score, seed)
    assert families.p_of_structure(smooth, (4,), copies=19) == 1 / 20
    before, after = ms.main_effects(score), ms.main_effects(smooth)
    np.testing.assert_allclose(after.effect, before.effect, atol=1e-9)
    assert after.residual.std() == pytest.approx(float(before.residual.std()))
    np.testing.assert_array_equal(np.diag(smooth), np.diag(score))


def rand_by_pairs(first, second):
    """Adjusted Rand index by its definition (Hubert and Arabie), from pairs."""
    pairs = list(combinations(range(len(first)), 2))
    one, other = (np.array([labels[i] == labels[j] for i, j in pairs]) for labels in (first, second))
    expected = one.sum() * other.sum() / len(pairs)
    return ((one & other).sum() - expected) / ((one.sum() + other.sum()) / 2 - expected)


def test_index_is_the_mean_of_adjusted_rand_indices_and_the_typical_start_has_the_best():
    random = np.random.default_rng(0)
    first, second = random.integers(4, size=(3, 30)), random.integers(3, size=(2, 30))
    expected = np.mean([rand_by_pairs(a, b) for a in first for b in second])
    assert families.mean_index(first, second) == pytest.approx(expected)
    assert families.mean_index([BLOCKS], [2 - BLOCKS]) == 1
    assert (families.typical(np.stack([first[0], BLOCKS[first[1] % 3], first[0]])) == first[0]).all()


def test_indices_by_chance_are_around_zero_and_keep_what_the_groups_they_shuffle_within_give():
    null = families.by_chance([BLOCKS] * 2, [BLOCKS] * 2, np.zeros(24), n=400)
    assert abs(null.mean()) < 0.02
    assert (families.by_chance([BLOCKS], [BLOCKS], BLOCKS, n=9) == 1).all()
    order = families.shuffled_within(BLOCKS, np.random.default_rng(0))
    assert (BLOCKS[order] == BLOCKS).all()
    assert sorted(order) == list(range(24)) != list(order)


def test_interval_reaches_as_far_as_means_of_whole_samples_vary():
    random = np.random.default_rng(0)
    samples = random.normal(size=(200, 60))
    halves = [[x[random.permutation(60)[:30]].mean() for _ in range(30)] for x in samples]
    found = np.array([families.with_interval(x.mean(), h) for x, h in zip(samples, halves, strict=True)])
    assert 0.9 < (abs(found[:, 0]) < found[:, 2] - found[:, 0]).mean() < 0.99


def test_consensus_is_the_share_of_clusterings_with_both_that_join_a_pair():
    one, other = planted(np.array([0, 0, 1, 1])), planted(np.array([0, 1, 0, 1]))
    together = families.consensus([one, other, one[[3, 1, 2, 0], [3, 1, 2, 0]]], 2)
    third = 1 / 3
    np.testing.assert_allclose(together.loc["m0"], [1, 2 * third, third, 0])
    without = families.consensus([one, other[:3, :3]], 2)
    np.testing.assert_allclose(without.loc["m3"], [0, 0, 1, 1])
    assert without.loc["m0", "m1"] == 0.5


def test_stability_is_own_less_next_best_consensus():
    together = matrix([[1, 0.9, 0.3, 0.2], [0.9, 1, 0.1, 0.4], [0.3, 0.1, 1, 0.0], [0.2, 0.4, 0.0, 1]])
    result = families.stability(together.to_pandas(), np.array([0, 0, 1, 2]))
    np.testing.assert_allclose(result, [0.9 - 0.3, 0.9 - 0.4, 1 - 0.2, 1 - 0.3])


def test_blocks_are_firm_under_noise_and_clusters_of_noise_are_not():
    for score, low, high in ((planted(BLOCKS), 0.95, 1), (noise_only(24), -1, 0.6)):
        together = families.consensus(families.perturbed(score, n=20), 3)
        firm = families.stability(together, ms.spectral_clusters(score, 3).values)
        assert low < firm.mean() <= high
    assert families.firm(np.stack([BLOCKS, BLOCKS]), BLOCKS) == {0: 1, 1: 1, 2: 1}


def test_marks_are_fishers_test_corrected_for_all_questions_and_find_the_planted_one():
    random = np.random.default_rng(0)
    parts = pd.DataFrame({"mark": BLOCKS == 1, "chance": random.integers(2, size=24)})
    found = families.marks(BLOCKS, parts)
    first = found.iloc[0]
    assert (first.group, first.component, first.value, first.inside, first.outside) == (1, "mark", True, 8, 0)
    assert first.p == pytest.approx(1 / comb(24, 8))
    assert first.q == pytest.approx(12 * first.p)  # three groups, four values
    assert set(found.component) == {"mark"}
    shares = [hypergeom.sf(row.inside - 1, 24, row.inside + row.outside, 8) for row in found.itertuples()]
    np.testing.assert_allclose(found.p, shares)


def test_groups_are_named_by_marks_of_two_components_or_by_none():
    rows = [("Stem layer", "7s2"), ("Stem layer", "4s4"), ("Pooling (stem)", "No"), ("DW conv", "Yes")]
    found = pd.DataFrame(rows, columns=["component", "value"]).assign(group=0)
    named = families.group_names(np.array([0, 0, 1]), found)
    assert named == {0: "7s2 stem, no pooling in the stem", 1: "no mark"}
